//! What the server says, as JSON: names with units, stable for scripts.

use nebd_rpc::admin;
use serde::Serialize;

/// A volume.
#[derive(Debug, Serialize)]
pub struct Volume {
    name: String,
    size_bytes: u64,
    block_size: u32,
    owner_uid: u32,
    owner_gid: u32,
    mode: String,
    path: Option<String>,
    sessions: u32,
    parked: bool,
    parked_reason: Option<String>,
    epoch: Option<String>,
    iops_limit: u64,
    bytes_per_s_limit: u64,
    burst_ms: u64,
}

/// The server.
#[derive(Debug, Serialize)]
pub struct Status {
    version: String,
    pid: u32,
    generation: u32,
    uptime_ms: u64,
    file_engine: String,
    fd_store: bool,
    shards: u32,
    last_death: Option<String>,
    resident_bytes: u64,
    takeovers: u64,
    last_takeover: Option<Takeover>,
    sessions: Vec<Session>,
    volumes: Vec<Volume>,
}

/// A takeover.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs, reason = "as in the admin API")]
pub struct Takeover {
    pub kind: String,
    pub generation: u32,
    pub unix_ms: u64,
    pub blackout_us: u64,
}

impl From<&admin::Takeover> for Takeover {
    fn from(takeover: &admin::Takeover) -> Takeover {
        Takeover {
            kind: takeover.kind.clone(),
            generation: takeover.generation,
            unix_ms: takeover.unix_ms,
            blackout_us: takeover.blackout_us,
        }
    }
}

#[derive(Debug, Serialize)]
struct Session {
    id: String,
    volume: String,
    client_pid: u32,
    client_uid: u32,
    client_version: String,
    layout_version: u32,
    state: String,
    epoch: String,
    connected: bool,
    queues: Vec<Queue>,
    requests: u64,
    errors: u64,
    bytes_read: u64,
    bytes_written: u64,
    takeovers: u64,
    blackout_last_us: u64,
    blackout_worst_us: u64,
    reissued: u32,
    stalled: u32,
}

#[derive(Debug, Serialize)]
struct Queue {
    depth: u32,
    in_flight: u32,
    shard: u32,
}

fn filled(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

impl From<&admin::Volume> for Volume {
    fn from(volume: &admin::Volume) -> Volume {
        Volume {
            name: volume.name.clone(),
            size_bytes: volume.size_bytes,
            block_size: volume.block_size,
            owner_uid: volume.owner_uid,
            owner_gid: volume.owner_gid,
            mode: format!("{:04o}", volume.mode),
            path: filled(&volume.path),
            sessions: volume.sessions,
            parked: volume.parked,
            parked_reason: filled(&volume.parked_reason),
            epoch: filled(&volume.epoch),
            iops_limit: volume.iops_limit,
            bytes_per_s_limit: volume.bytes_per_s_limit,
            burst_ms: volume.burst_ms,
        }
    }
}

impl From<&admin::Session> for Session {
    fn from(session: &admin::Session) -> Session {
        let queue = |queue: &admin::Queue| Queue {
            depth: queue.depth,
            in_flight: queue.in_flight,
            shard: queue.shard,
        };
        Session {
            id: session.id.clone(),
            volume: session.volume.clone(),
            client_pid: session.client_pid,
            client_uid: session.client_uid,
            client_version: session.client_version.clone(),
            layout_version: session.layout_version,
            state: session.state.clone(),
            epoch: session.epoch.clone(),
            connected: session.connected,
            queues: session.queues.iter().map(queue).collect(),
            requests: session.requests,
            errors: session.errors,
            bytes_read: session.bytes_read,
            bytes_written: session.bytes_written,
            takeovers: session.takeovers,
            blackout_last_us: session.blackout_last_us,
            blackout_worst_us: session.blackout_worst_us,
            reissued: session.reissued,
            stalled: session.stalled,
        }
    }
}

impl From<&admin::Status> for Status {
    fn from(status: &admin::Status) -> Status {
        Status {
            version: status.version.clone(),
            pid: status.pid,
            generation: status.generation,
            uptime_ms: status.uptime_ms,
            file_engine: status.file_engine.clone(),
            fd_store: status.fd_store,
            shards: status.shards,
            last_death: filled(&status.last_death),
            resident_bytes: status.resident_bytes,
            takeovers: status.takeovers,
            last_takeover: status.last_takeover.as_ref().map(Takeover::from),
            sessions: status.sessions.iter().map(Session::from).collect(),
            volumes: status.volumes.iter().map(Volume::from).collect(),
        }
    }
}

/// One JSON object, on one line.
pub fn line(value: &impl Serialize) -> anyhow::Result<String> {
    let mut line = serde_json::to_string(value)?;
    line.push('\n');
    Ok(line)
}
