//! The command line of planned takeovers.

use std::path::PathBuf;

use clap::Args;
use nebd_client::VolumeName;

use crate::cli::OutputArgs;
use crate::units::Span;

/// What follows the options in `--help` and the man pages.
pub const HELP: &str = "\
Exit codes:
  0    done; the dry run or the check found nothing against it
  1    refused, failed, or gone back: the old server serves, or its binary serves again
  2    the command line is wrong
  3    the server cannot be reached
  130  interrupted (Ctrl-C); what was started goes on

JSON (--json, one object, the last line of standard output; the steps go to standard error):
  operation_id       32 hexadecimal digits
  kind               upgrade, rollback, dry_run, check
  state              done, probation (with --no-wait), refused, failed, rolled_back,
                     lost (the server died on the way, its successor knows nothing of it)
  reason             why it is not done, or null
  from, to           {version, binary, pid, generation}, or null
  steps              [{name, at_us (since the start), duration_us, detail}]
  blackout_us        {volumes, p50, p99, worst, worst_volume}, or null
  blackouts          [{volume, session, blackout_us}]
  clients            [{session, volume, client_pid, client_version, layout_version, supported,
                     reason}]
  probation_left_ms";

/// A planned takeover.
#[derive(Debug, Args)]
pub struct UpgradeArgs {
    /// The new server [default: the file that the present server runs, as it is now]
    #[arg(long, value_name = "PATH")]
    pub binary: Option<PathBuf>,
    /// A volume, BACKEND:NAME, that the new server reads more of, and that decides the probation
    #[arg(long, value_name = "VOLUME")]
    pub canary: Option<VolumeName>,
    /// How long the new server may still go back by itself, such as 90s or 5min; none for not at all
    #[arg(long, value_name = "TIME", default_value = "60s")]
    pub probation: Span,
    /// Do all that can be done without a change of owner: start it, hand over, read; then end it
    #[arg(long)]
    pub dry_run: bool,
    /// Only say whether the new server supports each attached client
    #[arg(long, conflicts_with = "dry_run")]
    pub check: bool,
    /// Return once the new server serves; the probation goes on without you
    #[arg(long)]
    pub no_wait: bool,
    /// How to print
    #[command(flatten)]
    pub output: OutputArgs,
}
