//! The command line of attachments.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use nebd_client::VolumeName;
use nebd_rpc::admin::AttachmentKind;

use crate::cli::OutputArgs;

/// What follows the options in `--help` and the man pages.
pub const HELP: &str = "\
JSON (--json, one object, the last line of standard output):
  attach               {volume, kind (vhost-user or nbd), socket, read_only, queues,
                       connected (connections), problem (why nobody can connect, or null)}
  detach, attachments  {attachments: [such objects]}";

/// What a hypervisor speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// vhost-user-blk: the server works in the guest's memory
    VhostUser,
    /// Network Block Device, at a Unix socket
    Nbd,
}

impl Kind {
    /// As the server has it.
    pub fn as_admin(self) -> AttachmentKind {
        match self {
            Kind::VhostUser => AttachmentKind::VhostUser,
            Kind::Nbd => AttachmentKind::Nbd,
        }
    }

    /// As on the command line.
    pub fn name_of(kind: AttachmentKind) -> &'static str {
        match kind {
            AttachmentKind::VhostUser => "vhost-user",
            AttachmentKind::Nbd => "nbd",
            AttachmentKind::Unspecified => "unknown",
        }
    }
}

/// A volume to be attached.
#[derive(Debug, Args)]
pub struct AttachArgs {
    /// The volume, BACKEND:NAME
    #[arg(value_name = "VOLUME")]
    pub name: VolumeName,
    /// What the hypervisor speaks
    #[arg(long = "as", value_enum)]
    pub kind: Kind,
    /// Where to listen; root's to choose, and shared by nothing but nbd [default: beside the server's
    /// socket, vhost-user/BACKEND-NAME.sock or nbd.sock]
    #[arg(id = "listen", long = "socket", value_name = "PATH")]
    pub path: Option<PathBuf>,
    /// Socket of the server, as before the command
    // Here --socket is another one; this takes the place of the global one.
    #[arg(id = "socket", long = "server-socket", value_name = "PATH")]
    _server: Option<PathBuf>,
    /// Virtqueues at most, vhost-user only [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub queues: Option<u32>,
    /// Refuse writes
    #[arg(long)]
    pub read_only: bool,
    /// How to print
    #[command(flatten)]
    pub output: OutputArgs,
}

/// A volume to be detached.
#[derive(Debug, Args)]
pub struct DetachArgs {
    /// The volume, BACKEND:NAME
    #[arg(value_name = "VOLUME")]
    pub name: VolumeName,
    /// This attachment alone [default: all of the volume]
    #[arg(long = "as", value_enum)]
    pub kind: Option<Kind>,
    /// How to print
    #[command(flatten)]
    pub output: OutputArgs,
}
