//! Why a command ends badly, and with which exit code.

use std::path::PathBuf;
use std::process::ExitCode;

/// What `--help` and the man page say about exit codes.
pub const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    the operation failed: the server refused it, or something it needs failed; an upgrade was
       refused, failed, or went back
  2    the command line is wrong
  3    the server cannot be reached
  4    bench, demo, import or export found errors, mismatches or damage
  130  interrupted (Ctrl-C)";

/// Why a command ends badly.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The server answered with an error; its message names the volume and what to do.
    #[error("{message}")]
    Refused {
        /// What the server said.
        message: String,
        /// The errno that came with it.
        errno: Option<i32>,
    },
    /// Nothing answers at the socket.
    #[error("cannot reach nebd-server at {}: {source}; {advice}", socket.display())]
    Unreachable {
        /// The admin socket.
        socket: PathBuf,
        /// Why.
        source: std::io::Error,
        /// What to do.
        advice: &'static str,
    },
    /// The server was reached, but gave no answer in time.
    #[error(
        "nebd-server at {} gave no answer within {timeout_s} s ({detail}); look at its log, or \
         wait longer with --timeout", socket.display()
    )]
    Silent {
        /// The admin socket.
        socket: PathBuf,
        /// How long was waited.
        timeout_s: u64,
        /// What happened last.
        detail: String,
    },
    /// The command line parses, but asks for something impossible.
    #[error("{0}")]
    Usage(String),
    /// Data was wrong, or requests failed.
    #[error("{message}")]
    Wrong {
        /// The result, for standard output.
        report: String,
        /// What is wrong.
        message: String,
    },
    /// A planned takeover that did not come to its good end.
    #[error("{message}")]
    Takeover {
        /// What is known of it, for standard output.
        report: String,
        /// Why, who serves now, and what to do.
        message: String,
    },
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
    /// Anything else, with its causes.
    #[error("{0:#}")]
    Other(#[from] anyhow::Error),
}

impl Failure {
    /// What goes to standard output all the same.
    pub fn report(&self) -> &str {
        match self {
            Failure::Wrong { report, .. } | Failure::Takeover { report, .. } => report,
            _ => "",
        }
    }

    /// The process's exit code for this.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Failure::Refused { .. } | Failure::Takeover { .. } | Failure::Other(_) => 1,
            Failure::Usage(_) => 2,
            Failure::Unreachable { .. } | Failure::Silent { .. } => 3,
            Failure::Wrong { .. } => 4,
            Failure::Interrupted => 130,
        })
    }
}
