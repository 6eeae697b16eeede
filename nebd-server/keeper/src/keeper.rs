//! The keeper process.

mod config;

pub use config::{KeeperConfig, KeeperError};
