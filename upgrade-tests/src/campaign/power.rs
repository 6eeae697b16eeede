//! Power cuts: the other half of "acknowledged". What was flushed, or written with FUA, is there
//! again; also when the server was replaced between the write and the flush.
//!
//! ```text
//!  load ─► kill ─► load ─► drain ─► power cut ─► read every block ─► load …
//! ```

use std::time::{Duration, Instant};

use super::{Campaign, CampaignConfig, CampaignError, Kill, Summary};
use crate::fence_store::control;
use crate::load::Load;
use crate::supervisor::HostError;

/// How many requests are answered between two power cuts, at least.
const REQUESTS: u64 = 1500;

/// Cuts the power of the fence-store `cuts` times, with one kill before each.
pub fn run_power_cuts(mut config: CampaignConfig, cuts: u64) -> Result<Summary, CampaignError> {
    config.backend = "fence-test".into();
    config.store_arguments.push("--volatile".into());
    // Enough of both, and writes between them that may be lost.
    config.mix.flush = config.mix.flush.max(4);
    config.mix.fua = config.mix.fua.max(8);
    let mut campaign = Campaign::prepare(config)?;
    let mut streams = campaign.start_streams(true)?;
    for cut in 0..cuts {
        campaign.load = Some(Load::start(streams, campaign.config.threads));
        campaign.wait_for_requests(REQUESTS)?;
        campaign.kill(&Kill::SIGKILL)?;
        campaign.wait_for_requests(REQUESTS)?;
        streams = campaign.load.take().map(Load::drain).unwrap_or_default();
        if streams.iter().any(|stream| !stream.report().is_clean()) {
            break;
        }
        let socket = campaign.store.as_ref().map(|store| store.socket().to_owned());
        let answer = control::ask(&socket.unwrap_or_default(), &format!("power-cut {cut}"));
        let lost =
            answer.map_err(|source| HostError::System { action: "cut the power", source })?;
        campaign.timeline.note(format!("power cut #{} ({lost} sectors lost)", cut + 1));
        streams.iter_mut().for_each(crate::stream::Stream::cut_power);
        streams =
            Load::start_with(streams, campaign.config.threads, crate::stream::Goal::Sweep).sweep();
    }
    campaign.load = Some(Load::start(streams, campaign.config.threads));
    Ok(campaign.finish())
}

impl Campaign {
    fn wait_for_requests(&self, requests: u64) -> Result<(), CampaignError> {
        let Some(load) = &self.load else { return Ok(()) };
        let goal = load.completions() + requests;
        let limit = self.config.stall_limit + Duration::from_secs(20);
        let deadline = Instant::now() + limit;
        while load.completions() < goal && load.problems() == 0 {
            if Instant::now() > deadline {
                return Err(self.late("enough requests", limit));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}
