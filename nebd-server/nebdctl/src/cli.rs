//! The command line.

pub mod attachment;
pub mod upgrade;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use nebd_client::VolumeName;

use crate::failure::EXIT_CODES;
use crate::units::{Mode, Owner, Size};

/// The operator's command for nebd
///
/// Speaks to a running nebd-server over its admin socket. Results go to standard output, errors to
/// standard error; with --json the last line of standard output is one JSON object.
#[derive(Debug, Parser)]
#[command(name = "nebdctl", version, max_term_width = 100, after_help = EXIT_CODES)]
pub struct Cli {
    /// Socket of the server; the admin socket is this path with ".admin" after it
    #[arg(
        long,
        global = true,
        env = "NEBD_SOCKET",
        value_name = "PATH",
        default_value = "/run/nebd/nebd.sock"
    )]
    pub socket: PathBuf,

    /// Seconds to wait for an answer of the server
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 30)]
    pub timeout: u64,

    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create, list, resize, delete volumes; deal with parked ones
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Serve a volume to a hypervisor that does not have nebd's library
    ///
    /// From now on, and after every restart, until it is detached. Prints the socket, and what to tell
    /// the hypervisor. Who connects needs the right to the volume (its owner or mode) as any other
    /// client does.
    #[command(after_help = attachment::HELP)]
    Attach(attachment::AttachArgs),
    /// End what attach began; the hypervisor loses its disk
    #[command(after_help = attachment::HELP)]
    Detach(attachment::DetachArgs),
    /// List the volumes that are served to hypervisors without nebd's library
    #[command(after_help = attachment::HELP)]
    Attachments(OutputArgs),
    /// Show the server, its sessions and queues, and the blackouts their clients saw
    Status(OutputArgs),
    /// Replace the server under its clients, and go back by itself if that does not go well
    ///
    /// The new server is started beside the present one, is handed everything, opens and reads each
    /// volume, and only then takes over, within milliseconds. Whatever goes wrong before that leaves
    /// the present server serving. Prints each step as it happens: when, what, how long. Needs root.
    #[command(after_help = upgrade::HELP)]
    Upgrade(upgrade::UpgradeArgs),
    /// Go back to the server that served before; ends a probation at once
    ///
    /// A planned takeover too, by the binary that was replaced. Needs root.
    #[command(after_help = upgrade::HELP)]
    Rollback(OutputArgs),
    /// Watch what goes on in each volume, again every second
    ///
    /// q or Ctrl-C ends it. Latencies are the server's, from a request's being taken from the ring
    /// to its answer. Goes on over the server's death. Written to a pipe or file it tells the same,
    /// one table after another.
    Top(TopArgs),
    /// Measure a volume through the part client
    ///
    /// A write test overwrites what the volume holds. Exit code 4 if a request failed or a block
    /// was wrong.
    #[command(after_help = EXIT_CODES)]
    Bench(BenchArgs),
    /// Watch a disk outlive its server: kill the server again and again under verified IO
    ///
    /// Starts a keeper and a server of its own in a temporary directory, puts a file system on one
    /// volume and stamped blocks on another, and kills the server with SIGKILL while writes are in
    /// flight. Needs no configuration, takes less than a minute, and removes what it made.
    ///
    /// With --upgrade the server is replaced in turn by a planned upgrade, by one that is refused, by
    /// one that fails on the way and is rolled back, and by a SIGKILL.
    #[command(after_help = EXIT_CODES)]
    Demo(DemoArgs),
    /// Print the completion script for a shell
    Completions {
        /// For which shell
        shell: clap_complete::Shell,
    },
    /// Write the man pages
    Man {
        /// Directory to write them to; made if missing
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
    },
}

/// How results are printed.
#[derive(Debug, Clone, Copy, Args)]
pub struct OutputArgs {
    /// Print one JSON object as the last line
    #[arg(long)]
    pub json: bool,
}

/// The live view.
#[derive(Debug, Clone, Args)]
pub struct TopArgs {
    /// Seconds between looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, value_parser = interval)]
    pub interval: f64,
    /// Look twice, tell what went on in between, and end
    #[arg(long)]
    pub once: bool,
    /// How to print; without --once one object after another, each on a line
    #[command(flatten)]
    pub output: OutputArgs,
}

fn interval(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("it is a number of seconds, 0.1 to 3600".to_owned()),
    }
}

/// What to do with volumes. Volumes are named BACKEND:NAME, such as file:disk1.
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Make a volume
    Create(CreateArgs),
    /// List the volumes
    List(OutputArgs),
    /// Show one volume
    Info(NamedArgs),
    /// Change the size of a volume
    Resize(ResizeArgs),
    /// Delete a volume that nobody has attached
    ///
    /// An image that nebd made is removed; a file or device given with --path stays.
    Delete(NamedArgs),
    /// Fill a volume with a disk image
    ///
    /// Makes the volume if it does not exist, as large as the image (its end filled up with zeros to
    /// a whole block). A volume that holds anything but zeros is refused without --overwrite. Holes
    /// stay holes. The volume is read back and compared with what was read of the image. If the
    /// import fails or is interrupted, a volume that it made is deleted.
    #[command(after_help = EXIT_CODES)]
    Import(ImportArgs),
    /// Write a volume to a disk image
    ///
    /// The file appears, with mode 0600, once it is complete, durable and verified; an error or Ctrl-C
    /// leaves nothing. Zeros become holes. Exported to standard output nothing is verified, and what
    /// is told goes to standard error.
    #[command(after_help = EXIT_CODES)]
    Export(ExportArgs),
    /// Limit what a volume may have of the host's storage
    ///
    /// At once, for all of its sessions together, and kept over restarts; for root. What is not given
    /// stays as it is, and none means no limit.
    Limit(LimitArgs),
    /// Serve a parked volume again, and give its suspect request another chance
    Unpark(NamedArgs),
    /// Serve a parked volume again, and answer its suspect request with EIO
    Abort(NamedArgs),
}

/// One volume.
#[derive(Debug, Args)]
pub struct NamedArgs {
    /// The volume, BACKEND:NAME
    #[arg(value_name = "VOLUME")]
    pub name: VolumeName,
    /// How to print
    #[command(flatten)]
    pub output: OutputArgs,
}

/// A volume to be made.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// The volume, BACKEND:NAME
    #[arg(value_name = "VOLUME")]
    pub name: VolumeName,
    /// Size, such as 64MiB or 10G; with --path the default is that of the file or device
    #[arg(long, value_name = "SIZE", required_unless_present = "path")]
    pub size: Option<Size>,
    /// Block size, 512 or 4096
    #[arg(long, value_name = "BYTES", default_value = "4096", value_parser = block_size)]
    pub block_size: u32,
    /// An existing file or block device to serve (backend file)
    #[arg(long, value_name = "PATH")]
    pub path: Option<PathBuf>,
    /// Who owns the volume, in numbers [default: you]
    #[arg(long, value_name = "UID:GID")]
    pub owner: Option<Owner>,
    /// Who may attach it: r to read, w to write [default: 0600]
    #[arg(long, value_name = "OCTAL")]
    pub mode: Option<Mode>,
    /// How to print
    #[command(flatten)]
    pub output: OutputArgs,
}

/// A new size.
#[derive(Debug, Args)]
pub struct ResizeArgs {
    /// The volume, BACKEND:NAME
    #[arg(value_name = "VOLUME")]
    pub name: VolumeName,
    /// New size, such as 64MiB or 10G
    #[arg(long, value_name = "SIZE")]
    pub size: Size,
    /// Allow a smaller size; what lies beyond is lost
    #[arg(long)]
    pub shrink: bool,
    /// How to print
    #[command(flatten)]
    pub output: OutputArgs,
}

/// New limits.
#[derive(Debug, Args)]
#[group(id = "limits", required = true, multiple = true, args = ["iops", "bandwidth", "burst"])]
pub struct LimitArgs {
    /// The volume, BACKEND:NAME
    #[arg(value_name = "VOLUME")]
    pub name: VolumeName,
    /// Requests a second
    #[arg(long, value_name = "N|none", value_parser = iops)]
    pub iops: Option<u64>,
    /// Bytes read and written a second, such as 100MiB
    #[arg(long, value_name = "SIZE|none", value_parser = bandwidth)]
    pub bandwidth: Option<u64>,
    /// What an idle volume saves up, in milliseconds at its limits
    #[arg(long, value_name = "MS")]
    pub burst: Option<u64>,
    /// How to print
    #[command(flatten)]
    pub output: OutputArgs,
}

fn iops(text: &str) -> Result<u64, String> {
    match text {
        "none" => Ok(0),
        _ => text.parse().map_err(|_| "it is a number, or none".to_owned()),
    }
}

fn bandwidth(text: &str) -> Result<u64, String> {
    match text {
        "none" => Ok(0),
        _ => text.parse::<Size>().map(|size| size.0).map_err(|error| error.to_string()),
    }
}

/// Format of an image that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SourceFormat {
    /// qcow2 if it begins as one, else raw
    Auto,
    /// The bytes of the disk
    Raw,
    /// QEMU's format; needs qemu-img
    Qcow2,
}

/// Format of an image that is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TargetFormat {
    /// The bytes of the disk, zeros as holes
    Raw,
    /// QEMU's format; needs qemu-img
    Qcow2,
}

/// An image to be read into a volume.
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// The image, a file or block device; - is standard input
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// The volume, BACKEND:NAME
    #[arg(value_name = "VOLUME")]
    pub name: VolumeName,
    /// Format of the image; name it if you do not trust where the image comes from
    #[arg(long, value_enum, default_value = "auto")]
    pub format: SourceFormat,
    /// Size of a volume that is made, such as 10G [default: that of the image]
    #[arg(long, value_name = "SIZE")]
    pub size: Option<Size>,
    /// Block size of a volume that is made, 512 or 4096
    #[arg(long, value_name = "BYTES", default_value = "4096", value_parser = block_size)]
    pub block_size: u32,
    /// Who owns a volume that is made, in numbers [default: you]
    #[arg(long, value_name = "UID:GID")]
    pub owner: Option<Owner>,
    /// Who may attach a volume that is made: r to read, w to write [default: 0600]
    #[arg(long, value_name = "OCTAL")]
    pub mode: Option<Mode>,
    /// Replace what an existing volume holds, all of it: beyond the image it is zeros
    #[arg(long)]
    pub overwrite: bool,
    /// Do not read the volume back
    #[arg(long)]
    pub no_verify: bool,
    /// Requests of 1 MiB in flight
    #[arg(long, value_name = "N", default_value_t = 16,
          value_parser = clap::value_parser!(u32).range(1..=64))]
    pub iodepth: u32,
    /// How to print
    #[command(flatten)]
    pub output: OutputArgs,
}

/// A volume to be written to an image.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The volume, BACKEND:NAME
    #[arg(value_name = "VOLUME")]
    pub name: VolumeName,
    /// The image; - is standard output
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Format of the image
    #[arg(long, value_enum, default_value = "raw")]
    pub format: TargetFormat,
    /// Replace the file if it exists
    #[arg(long)]
    pub overwrite: bool,
    /// Do not read the file back
    #[arg(long)]
    pub no_verify: bool,
    /// Requests of 1 MiB in flight
    #[arg(long, value_name = "N", default_value_t = 16,
          value_parser = clap::value_parser!(u32).range(1..=64))]
    pub iodepth: u32,
    /// How to print
    #[command(flatten)]
    pub output: OutputArgs,
}

/// What the benchmark asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BenchOp {
    /// Reads at random offsets
    Randread,
    /// Writes at random offsets
    Randwrite,
    /// Sequential reads
    Read,
    /// Sequential writes
    Write,
}

impl BenchOp {
    /// Whether it changes the volume.
    pub fn writes(self) -> bool {
        matches!(self, BenchOp::Randwrite | BenchOp::Write)
    }

    /// Whether offsets are drawn at random.
    pub fn random(self) -> bool {
        matches!(self, BenchOp::Randread | BenchOp::Randwrite)
    }

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            BenchOp::Randread => "randread",
            BenchOp::Randwrite => "randwrite",
            BenchOp::Read => "read",
            BenchOp::Write => "write",
        }
    }
}

/// A benchmark.
#[derive(Debug, Clone, Args)]
pub struct BenchArgs {
    /// The volume, BACKEND:NAME; {} in it stands for the number of the session, from 0
    #[arg(long, value_name = "VOLUME")]
    pub volume: String,
    /// What to ask for
    #[arg(long, value_enum, default_value = "randread")]
    pub op: BenchOp,
    /// Bytes of each request
    #[arg(long, value_name = "SIZE", default_value = "4KiB")]
    pub block_size: Size,
    /// Requests in flight on each queue
    #[arg(long, value_name = "N", default_value_t = 32,
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub iodepth: u32,
    /// Queues of each session, one thread each
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=64))]
    pub queues: u32,
    /// Sessions, that is volumes attached, at once
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub sessions: u32,
    /// How long to measure
    #[arg(long, value_name = "SECONDS", default_value_t = 10,
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub seconds: u64,
    /// Stamp each block, and check each block that is read again; writes read back what they wrote
    #[arg(long)]
    pub verify: bool,
    /// Poll for completions instead of sleeping; a processor for each queue
    #[arg(long)]
    pub poll: bool,
    /// How to print
    #[command(flatten)]
    pub output: OutputArgs,
}

/// The demonstration.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// File system image to put on the volume; a copy is used [default: an ext4 made on the spot]
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,
    /// Show planned upgrades, good and bad ones, and one SIGKILL
    #[arg(long, conflicts_with = "kills")]
    pub upgrade: bool,
    /// How often to kill the server
    #[arg(long, value_name = "N", default_value_t = 10,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub kills: u32,
    /// Seconds to spread the kills, or the upgrades, over
    #[arg(long, value_name = "SECONDS", default_value_t = 15,
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub seconds: u64,
    /// Keep a second server warm, ready to take over (the default)
    #[arg(long, overrides_with = "no_standby")]
    pub standby: bool,
    /// Start each server anew after the death of the one before
    #[arg(long)]
    pub no_standby: bool,
    /// The server to show [default: $NEBD_SERVER, beside nebdctl, or in $PATH]
    #[arg(long, value_name = "FILE", env = "NEBD_SERVER")]
    pub server: Option<PathBuf>,
    /// How to print
    #[command(flatten)]
    pub output: OutputArgs,
}

fn block_size(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(Size(bytes @ (512 | 4096))) => Ok(bytes as u32),
        _ => Err("a block is 512 or 4096 bytes".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_fixed_commands_parse() {
        for line in [
            "nebdctl --socket /tmp/s volume create file:disk1 --size 64MiB",
            "nebdctl volume create file:x --path /dev/vdb --owner 1:2 --mode 0660 --block-size 512",
            "nebdctl volume limit file:x --iops 500 --bandwidth 100MiB --burst 1000 --json",
            "nebdctl volume limit file:x --iops none",
            "nebdctl volume resize file:x --size 1G --shrink --json --socket /tmp/s",
            "nebdctl volume abort file:x",
            "nebdctl volume import - file:x --size 1G --format raw --overwrite --no-verify --json",
            "nebdctl volume import --block-size 512 --mode 0640 --owner 1:2 disk.qcow2 file:x",
            "nebdctl volume export file:x - --format qcow2 --overwrite --iodepth 4 --json",
            "nebdctl status --json",
            "nebdctl top --once --json --interval 0.2",
            "nebdctl bench --volume null:a --op randwrite --block-size 4k --iodepth 8 --queues 2 \
             --seconds 1 --verify --poll --json",
            "nebdctl upgrade --binary x --canary file:x --probation 90s --dry-run --json --no-wait",
            "nebdctl upgrade --check --json --socket /tmp/s",
            "nebdctl rollback --json",
            "nebdctl demo --kills 3 --no-standby --json",
            "nebdctl demo --upgrade --seconds 8 --json",
            "nebdctl completions bash",
        ] {
            Cli::try_parse_from(line.split_whitespace()).unwrap();
        }
        assert!(Cli::try_parse_from(["nebdctl", "volume", "create", "file:x"]).is_err());
        assert!(Cli::try_parse_from(["nebdctl", "volume", "info", "../x"]).is_err());
    }
}
