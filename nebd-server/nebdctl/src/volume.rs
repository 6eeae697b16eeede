//! `nebdctl volume …`

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context as _;
use nebd_rpc::admin::{
    AbortVolumeRequest, CreateVolumeRequest, DeleteVolumeRequest, GetVolumeRequest,
    LimitVolumeRequest, ListVolumesRequest, ResizeVolumeRequest, UnparkVolumeRequest, Volume,
};
use serde::Serialize;

use crate::cli::{CreateArgs, LimitArgs, OutputArgs, VolumeCommand};
use crate::connection::{Connection, operation_id};
use crate::failure::Failure;
use crate::image;
use crate::table::Table;
use crate::units::{Mode, Size};
use crate::view;

/// Does it, and returns what to print.
pub fn run(
    socket: &Path,
    connection: &Connection,
    command: VolumeCommand,
) -> Result<String, Failure> {
    match command {
        VolumeCommand::Import(args) => image::import::run(socket, connection, &args),
        VolumeCommand::Export(args) => image::export::run(socket, connection, &args),
        VolumeCommand::Create(args) => create(connection, args),
        VolumeCommand::List(output) => {
            let reply = connection
                .call(|mut c| async move { c.list_volumes(ListVolumesRequest {}).await })?;
            list(&reply.volumes, output)
        }
        VolumeCommand::Info(args) => {
            let request = GetVolumeRequest { name: args.name.to_string() };
            let volume = ask(connection, &request)?;
            print(&volume, info(&volume), args.output)
        }
        VolumeCommand::Resize(args) => {
            let volume = resize(connection, args.name.as_str(), args.size.0, args.shrink)?;
            let text = format!("{} is {} now\n", volume.name, Size(volume.size_bytes));
            print(&volume, text, args.output)
        }
        VolumeCommand::Delete(args) => {
            delete(connection, args.name.as_str())?;
            deleted(args.name.as_str(), args.output)
        }
        VolumeCommand::Limit(args) => {
            let volume = limit(connection, &args)?;
            let text = format!("{}: {}\n", volume.name, limits(&volume));
            print(&volume, text, args.output)
        }
        VolumeCommand::Unpark(args) => {
            let request = UnparkVolumeRequest { name: args.name.to_string() };
            let volume = connection.call(|mut c| {
                let request = request.clone();
                async move { c.unpark_volume(request).await }
            })?;
            let text =
                format!("{} is served again; its suspect request is tried again\n", volume.name);
            print(&volume, text, args.output)
        }
        VolumeCommand::Abort(args) => {
            let request = AbortVolumeRequest { name: args.name.to_string() };
            let volume = connection.call(|mut c| {
                let request = request.clone();
                async move { c.abort_volume(request).await }
            })?;
            let text = format!("{} is served again; its suspect request got EIO\n", volume.name);
            print(&volume, text, args.output)
        }
    }
}

fn create(connection: &Connection, args: CreateArgs) -> Result<String, Failure> {
    let volume = make(connection, &creation(&args)?)?;
    let size = Size(volume.size_bytes);
    print(&volume, format!("{} created, {size}\n", volume.name), args.output)
}

/// Makes a volume.
pub fn make(connection: &Connection, request: &CreateVolumeRequest) -> Result<Volume, Failure> {
    connection.call(|mut c| {
        let request = request.clone();
        async move { c.create_volume(request).await }
    })
}

/// What the server knows of the volume.
pub fn ask(connection: &Connection, request: &GetVolumeRequest) -> Result<Volume, Failure> {
    connection.call(|mut c| {
        let request = request.clone();
        async move { c.get_volume(request).await }
    })
}

/// Changes a size.
pub fn resize(
    connection: &Connection,
    name: &str,
    size_bytes: u64,
    shrink: bool,
) -> Result<Volume, Failure> {
    let request = ResizeVolumeRequest {
        operation_id: new_operation()?.into(),
        name: name.to_owned(),
        size_bytes,
        shrink,
    };
    connection.call(|mut c| {
        let request = request.clone();
        async move { c.resize_volume(request).await }
    })
}

fn limit(connection: &Connection, args: &LimitArgs) -> Result<Volume, Failure> {
    let request = LimitVolumeRequest {
        name: args.name.to_string(),
        iops: args.iops,
        bytes_per_s: args.bandwidth,
        burst_ms: args.burst,
    };
    connection.call(|mut c| {
        let request = request.clone();
        async move { c.limit_volume(request).await }
    })
}

/// What a volume may have, for people.
fn limits(volume: &Volume) -> String {
    let iops = (volume.iops_limit > 0).then(|| format!("{} IOPS", volume.iops_limit));
    let bytes = (volume.bytes_per_s_limit > 0)
        .then(|| format!("{} a second", Size(volume.bytes_per_s_limit)));
    let parts: Vec<String> = iops.into_iter().chain(bytes).collect();
    if parts.is_empty() {
        return "no limits".into();
    }
    format!("{}, bursts of {} ms", parts.join(", "), volume.burst_ms)
}

/// Deletes a volume.
pub fn delete(connection: &Connection, name: &str) -> Result<(), Failure> {
    let operation_id = new_operation()?.into();
    let request = DeleteVolumeRequest { operation_id, name: name.to_owned() };
    connection.call(|mut c| {
        let request = request.clone();
        async move { c.delete_volume(request).await }
    })?;
    Ok(())
}

/// The request for these arguments; the server's working directory is another one, so a path is
/// made absolute here.
pub fn creation(args: &CreateArgs) -> Result<CreateVolumeRequest, Failure> {
    let path = match &args.path {
        None => String::new(),
        Some(path) => {
            let path = std::path::absolute(path)
                .with_context(|| format!("cannot make {} absolute", path.display()))?;
            path.into_os_string().into_string().map_err(|path| {
                Failure::Usage(format!("the path {} is not UTF-8", path.to_string_lossy()))
            })?
        }
    };
    Ok(CreateVolumeRequest {
        operation_id: new_operation()?.into(),
        name: args.name.to_string(),
        size_bytes: args.size.map_or(0, |size| size.0),
        block_size: args.block_size,
        path,
        owner_uid: args.owner.map(|owner| owner.uid),
        owner_gid: args.owner.map(|owner| owner.gid),
        mode: args.mode.map(|mode| mode.0),
    })
}

/// An id for an operation that is not idempotent.
pub fn new_operation() -> Result<Vec<u8>, Failure> {
    Ok(operation_id().context("cannot draw an operation id from /dev/urandom")?)
}

fn print(volume: &Volume, text: String, output: OutputArgs) -> Result<String, Failure> {
    match output.json {
        true => Ok(view::line(&view::Volume::from(volume))?),
        false => Ok(text),
    }
}

fn deleted(name: &str, output: OutputArgs) -> Result<String, Failure> {
    #[derive(Serialize)]
    struct Deleted<'a> {
        name: &'a str,
        deleted: bool,
    }
    match output.json {
        true => Ok(view::line(&Deleted { name, deleted: true })?),
        false => Ok(format!("{name} deleted\n")),
    }
}

fn list(volumes: &[Volume], output: OutputArgs) -> Result<String, Failure> {
    #[derive(Serialize)]
    struct List {
        volumes: Vec<view::Volume>,
    }
    if output.json {
        let volumes = volumes.iter().map(view::Volume::from).collect();
        return Ok(view::line(&List { volumes })?);
    }
    if volumes.is_empty() {
        return Ok("no volumes; `nebdctl volume create file:disk1 --size 64MiB` makes one\n".into());
    }
    Ok(table(volumes).to_string())
}

/// One row a volume.
pub fn table(volumes: &[Volume]) -> Table {
    let mut table = Table::new(&[
        "VOLUME",
        ">SIZE",
        ">BLOCK",
        "OWNER",
        "MODE",
        ">SESSIONS",
        "EPOCH",
        "STATE",
        "PATH",
    ]);
    for volume in volumes {
        table.row(vec![
            volume.name.clone(),
            Size(volume.size_bytes).to_string(),
            volume.block_size.to_string(),
            format!("{}:{}", volume.owner_uid, volume.owner_gid),
            Mode(volume.mode).to_string(),
            volume.sessions.to_string(),
            dash(&volume.epoch),
            state(volume).into(),
            dash(&volume.path),
        ]);
    }
    table
}

/// `-` for nothing.
pub fn dash(text: &str) -> String {
    if text.is_empty() { "-".into() } else { text.into() }
}

fn state(volume: &Volume) -> &'static str {
    match volume {
        Volume { parked: true, .. } => "parked",
        Volume { sessions: 0, .. } => "idle",
        _ => "attached",
    }
}

/// What there is to do about a parked volume; nothing if it is not parked.
pub fn parked_advice(volume: &Volume) -> Option<String> {
    volume.parked.then(|| {
        let (name, reason) = (&volume.name, dash(&volume.parked_reason));
        format!(
            "{name} is parked ({reason}): its requests wait. `nebdctl volume unpark {name}` gives \
             the suspect request another chance, `nebdctl volume abort {name}` answers it with EIO"
        )
    })
}

fn info(volume: &Volume) -> String {
    let mut text = String::new();
    let mut line = |label: &str, value: String| {
        let _ = writeln!(text, "{label:<12}{value}");
    };
    line("volume", volume.name.clone());
    line("size", format!("{} ({} bytes)", Size(volume.size_bytes), volume.size_bytes));
    line("block size", volume.block_size.to_string());
    line("owner", format!("{}:{}", volume.owner_uid, volume.owner_gid));
    line("mode", Mode(volume.mode).to_string());
    line("path", dash(&volume.path));
    line("sessions", volume.sessions.to_string());
    line("epoch", dash(&volume.epoch));
    line("limits", limits(volume));
    line("state", state(volume).into());
    if let Some(advice) = parked_advice(volume) {
        let _ = writeln!(text, "\n{advice}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parked_volume_tells_what_to_do() {
        let volume = Volume {
            name: "file:a".into(),
            size_bytes: 1 << 20,
            parked: true,
            parked_reason: "3 servers died of slot 7".into(),
            ..Volume::default()
        };
        let text = info(&volume);
        assert!(text.contains("3 servers died of slot 7"));
        assert!(text.contains("nebdctl volume unpark file:a"));
        assert!(table(&[volume]).to_string().contains("parked"));
    }
}
