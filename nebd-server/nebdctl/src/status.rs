//! `nebdctl status`

use std::fmt::Write as _;

use nebd_rpc::admin::{GetStatusRequest, Session, Status, Upgrade, UpgradeState};
use serde::Serialize;

use crate::cli::OutputArgs;
use crate::connection::Connection;
use crate::failure::Failure;
use crate::table::Table;
use crate::top;
use crate::units::{Count, Micros, Size};
use crate::upgrade;
use crate::view;
use crate::volume::{dash, parked_advice, table};

/// Asks, and returns what to print.
pub fn run(connection: &Connection, output: OutputArgs) -> Result<String, Failure> {
    let status = ask(connection)?;
    // A server that tells its status but not this is an older one, or tells it to root alone.
    let upgrade = upgrade::ask(connection).ok().filter(|last| last.state() != UpgradeState::None);
    match output.json {
        true => {
            #[derive(Serialize)]
            struct Told<'a> {
                #[serde(flatten)]
                status: view::Status,
                upgrade: Option<upgrade::View<'a>>,
            }
            let upgrade = upgrade.as_ref().map(upgrade::View::of);
            Ok(view::line(&Told { status: view::Status::from(&status), upgrade })?)
        }
        false => Ok(text(&status, upgrade.as_ref())),
    }
}

/// The server's status.
pub fn ask(connection: &Connection) -> Result<Status, Failure> {
    connection.call(|mut c| async move { c.get_status(GetStatusRequest::default()).await })
}

fn text(status: &Status, upgrade: Option<&Upgrade>) -> String {
    let mut text = String::new();
    let mut line = |label: &str, value: String| {
        let _ = writeln!(text, "{label:<14}{value}");
    };
    line("server", format!("{}, pid {}", status.version, status.pid));
    line("generation", status.generation.to_string());
    line("up", Micros(status.uptime_ms.saturating_mul(1000)).to_string());
    line("last death", dash(&status.last_death));
    if let Some(upgrade) = upgrade {
        line("upgrade", upgrade::told(upgrade));
    }
    line("takeovers", top::takeovers_of(status));
    line("file engine", dash(&status.file_engine));
    let kept = if status.fd_store {
        "yes"
    } else {
        "no: without a keeper or systemd, clients bring theirs"
    };
    line("fds kept", kept.into());
    line("shards", status.shards.to_string());
    line("resident", Size(status.resident_bytes).to_string());
    if !status.volumes.is_empty() {
        let _ = write!(text, "\n{}", table(&status.volumes));
    }
    if status.sessions.is_empty() {
        text.push_str("\nno sessions\n");
    } else {
        let _ = write!(text, "\n{}", sessions(&status.sessions));
    }
    for advice in status.volumes.iter().filter_map(parked_advice) {
        let _ = writeln!(text, "\n{advice}");
    }
    text
}

fn sessions(sessions: &[Session]) -> Table {
    let mut table = Table::new(&[
        "SESSION",
        "VOLUME",
        "CLIENT",
        "VERSION",
        "STATE",
        "EPOCH",
        "QUEUES",
        ">IN FLIGHT",
        ">REQUESTS",
        ">ERRORS",
        ">READ",
        ">WRITTEN",
        ">TAKEOVERS",
        ">LAST",
        ">WORST",
    ]);
    for session in sessions {
        let state = match session.connected {
            true => session.state.clone(),
            false => format!("{}, not connected", session.state),
        };
        table.row(vec![
            session.id.chars().take(8).collect(),
            session.volume.clone(),
            format!("pid {} uid {}", session.client_pid, session.client_uid),
            format!("{} (layout {})", dash(&session.client_version), session.layout_version),
            state,
            dash(&session.epoch),
            queues(session),
            session.queues.iter().map(|queue| queue.in_flight).sum::<u32>().to_string(),
            Count(session.requests).to_string(),
            Count(session.errors).to_string(),
            Size(session.bytes_read).to_string(),
            Size(session.bytes_written).to_string(),
            session.takeovers.to_string(),
            blackout(session, session.blackout_last_us),
            blackout(session, session.blackout_worst_us),
        ]);
    }
    table
}

/// `2 × 32 on 0,1`: queues, their depth, the shards that serve them.
fn queues(session: &Session) -> String {
    let depth = session.queues.iter().map(|queue| queue.depth).max().unwrap_or(0);
    let mut shards: Vec<u32> = session.queues.iter().map(|queue| queue.shard).collect();
    shards.sort_unstable();
    shards.dedup();
    let shards: Vec<String> = shards.iter().map(u32::to_string).collect();
    format!("{} × {depth} on {}", session.queues.len(), shards.join(","))
}

fn blackout(session: &Session, us: u64) -> String {
    if session.takeovers == 0 { "-".into() } else { Micros(us).to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nebd_rpc::admin::{Queue, Volume};

    fn status() -> Status {
        let queue = |shard| Queue { depth: 32, in_flight: 3, shard };
        let session = Session {
            id: "00112233445566778899aabbccddeeff".into(),
            volume: "file:a".into(),
            client_version: "0.1.0".into(),
            state: "serving".into(),
            epoch: "1.4".into(),
            connected: true,
            queues: vec![queue(0), queue(1)],
            requests: 1_234_567,
            takeovers: 2,
            blackout_last_us: 12_300,
            blackout_worst_us: 45_600,
            ..Session::default()
        };
        let volume = Volume { name: "file:a".into(), sessions: 1, ..Volume::default() };
        Status { pid: 7, sessions: vec![session], volumes: vec![volume], ..Status::default() }
    }

    #[test]
    fn the_text_tells_queues_and_blackouts() {
        let text = text(&status(), None);
        for part in ["2 × 32 on 0,1", "1,234,567", "12.3 ms", "45.6 ms", "00112233  "] {
            assert!(text.contains(part), "{part} is missing in:\n{text}");
        }
    }

    #[test]
    fn the_json_is_one_line_with_units_in_its_names() {
        let line = view::line(&view::Status::from(&status())).unwrap();
        assert_eq!(line.matches('\n').count(), 1);
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["sessions"][0]["blackout_worst_us"], 45_600);
        assert_eq!(value["sessions"][0]["queues"][1]["shard"], 1);
        assert_eq!(value["volumes"][0]["mode"], "0000");
        assert!(value["last_death"].is_null());
    }
}
