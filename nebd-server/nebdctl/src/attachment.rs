//! `nebdctl attach`, `detach`, `attachments`

mod recipe;

use std::fmt::Write as _;

use anyhow::Context as _;
use nebd_rpc::admin::{AttachRequest, Attachment, DetachRequest, ListAttachmentsRequest};
use serde::Serialize;

use crate::cli::OutputArgs;
use crate::cli::attachment::{AttachArgs, DetachArgs, Kind};
use crate::connection::Connection;
use crate::failure::Failure;
use crate::table::Table;
use crate::view;
use crate::volume::new_operation;

/// An attachment, as JSON.
#[derive(Debug, Serialize)]
struct View<'a> {
    volume: &'a str,
    kind: &'static str,
    socket: &'a str,
    read_only: bool,
    queues: u32,
    connected: u32,
    problem: Option<&'a str>,
}

impl<'a> View<'a> {
    fn of(attachment: &'a Attachment) -> View<'a> {
        View {
            volume: &attachment.volume,
            kind: Kind::name_of(attachment.kind()),
            socket: &attachment.socket,
            read_only: attachment.read_only,
            queues: attachment.queues,
            connected: attachment.connected,
            problem: Some(attachment.problem.as_str()).filter(|problem| !problem.is_empty()),
        }
    }
}

#[derive(Serialize)]
struct Views<'a> {
    attachments: Vec<View<'a>>,
}

fn views(attachments: &[Attachment]) -> Result<String, Failure> {
    Ok(view::line(&Views { attachments: attachments.iter().map(View::of).collect() })?)
}

/// Attaches, and tells how a hypervisor gets there.
pub fn attach(connection: &Connection, args: AttachArgs) -> Result<String, Failure> {
    let socket = match &args.path {
        None => String::new(),
        // The server's working directory is another one.
        Some(path) => std::path::absolute(path)
            .with_context(|| format!("cannot make {} absolute", path.display()))?
            .into_os_string()
            .into_string()
            .map_err(|path| {
                Failure::Usage(format!("the path {} is not UTF-8", path.to_string_lossy()))
            })?,
    };
    let request = AttachRequest {
        operation_id: new_operation()?.into(),
        volume: args.name.to_string(),
        kind: args.kind.as_admin().into(),
        socket,
        queues: args.queues.unwrap_or(0),
        read_only: args.read_only,
    };
    let attachment = connection.call(|mut c| {
        let request = request.clone();
        async move { c.attach(request).await }
    })?;
    match args.output.json {
        true => Ok(view::line(&View::of(&attachment))?),
        false => Ok(recipe::text(&attachment)),
    }
}

/// Detaches.
pub fn detach(connection: &Connection, args: DetachArgs) -> Result<String, Failure> {
    let kind = args.kind.map_or_else(Default::default, Kind::as_admin);
    let request = DetachRequest {
        operation_id: new_operation()?.into(),
        volume: args.name.to_string(),
        kind: kind.into(),
    };
    let reply = connection.call(|mut c| {
        let request = request.clone();
        async move { c.detach(request).await }
    })?;
    if args.output.json {
        return views(&reply.attachments);
    }
    let mut text = String::new();
    for attachment in &reply.attachments {
        let kind = Kind::name_of(attachment.kind());
        let _ = writeln!(text, "{} is no longer attached as {kind}", attachment.volume);
    }
    Ok(text)
}

/// Lists.
pub fn list(connection: &Connection, output: OutputArgs) -> Result<String, Failure> {
    let reply = connection
        .call(|mut c| async move { c.list_attachments(ListAttachmentsRequest {}).await })?;
    if output.json {
        return views(&reply.attachments);
    }
    if reply.attachments.is_empty() {
        return Ok("no attachments; `nebdctl attach VOLUME --as vhost-user` makes one\n".into());
    }
    let mut table =
        Table::new(&["VOLUME", "KIND", "SOCKET", "ACCESS", ">QUEUES", ">CONNECTED", "PROBLEM"]);
    for attachment in &reply.attachments {
        table.row(vec![
            attachment.volume.clone(),
            Kind::name_of(attachment.kind()).into(),
            attachment.socket.clone(),
            if attachment.read_only { "ro" } else { "rw" }.into(),
            attachment.queues.to_string(),
            attachment.connected.to_string(),
            crate::volume::dash(&attachment.problem),
        ]);
    }
    Ok(table.to_string())
}
