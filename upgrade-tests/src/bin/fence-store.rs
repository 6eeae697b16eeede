//! Storage that fences, for the `fence-test` backend: see `nebd_upgrade_tests::fence_store`.

use std::path::PathBuf;

use clap::Parser;
use nebd_upgrade_tests::fence_store::faults::Faults;
use nebd_upgrade_tests::fence_store::server::{Store, StoreConfig};

/// Keeps volumes in memory, checks the fence of every operation, and delivers late, twice and again.
#[derive(Parser)]
#[command(name = "fence-store", version)]
struct Arguments {
    /// Where to listen; the control socket is beside it, with .ctl appended.
    #[arg(long)]
    socket: PathBuf,
    /// Let everything through: a harness that does not notice is broken.
    #[arg(long)]
    no_fence: bool,
    /// Lose what was not flushed when `power-cut` is asked for.
    #[arg(long)]
    r#volatile: bool,
    /// Operations in 1000 that are delayed.
    #[arg(long, default_value_t = Faults::LATE.delay)]
    delay: u32,
    /// Longest delay, in milliseconds.
    #[arg(long, default_value_t = Faults::LATE.delay_ms_max)]
    delay_ms_max: u64,
    /// Operations in 1000 that are delivered twice.
    #[arg(long, default_value_t = Faults::LATE.duplicate)]
    duplicate: u32,
    /// How often each frame of a dead connection is delivered again, at most.
    #[arg(long, default_value_t = Faults::LATE.redeliver)]
    redeliver: u32,
    /// Operations in a million that break their connection.
    #[arg(long, default_value_t = Faults::LATE.cut_per_million)]
    cut_per_million: u32,
    /// Seed of all of these.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> anyhow::Result<()> {
    let Arguments { socket, no_fence, r#volatile, delay, delay_ms_max, .. } = Arguments::parse();
    let Arguments { duplicate, redeliver, cut_per_million, seed, .. } = Arguments::parse();
    let faults = Faults { delay, delay_ms_max, duplicate, redeliver, cut_per_million };
    let config =
        StoreConfig { socket, faults, fence_is_off: no_fence, is_volatile: r#volatile, seed };
    Store::new(config).serve()?;
    Ok(())
}
