//! How the volumes of a campaign are attached.

use super::{Campaign, CampaignError};
use crate::client_device::{AttachOptions, ClientDevice};
use crate::device::Device;
use crate::stream::{Stream, StreamOptions};
use crate::supervisor::{Admin, HostError};
use crate::vhost_device::{Options, VhostDevice};

/// How volumes are attached.
#[derive(Clone, Debug, Default)]
pub enum Way {
    /// By the part client.
    #[default]
    Library,
    /// By vhost-user-blk, without a guest.
    VhostUser {
        /// How; the socket and the depth are the campaign's.
        options: Options,
        /// Control messages are sent all the time.
        churns: bool,
    },
}

type Opened = Result<Box<dyn Device>, Box<dyn std::error::Error + Send + Sync>>;

impl Campaign {
    pub(super) fn start_streams(
        &mut self,
        tracks_durability: bool,
    ) -> Result<Vec<Stream<Box<dyn Device>>>, CampaignError> {
        let admin = self.host.admin()?;
        (0..self.config.sessions)
            .map(|index| self.start_stream(&admin, index, tracks_durability))
            .collect()
    }

    fn start_stream(
        &mut self,
        admin: &Admin,
        index: usize,
        tracks_durability: bool,
    ) -> Result<Stream<Box<dyn Device>>, CampaignError> {
        let (bytes, block_bytes) = (self.config.volume_bytes, self.config.block_bytes);
        let volume = format!("{}:soak{index}", self.config.backend);
        admin.create(&volume, bytes, block_bytes).map_err(HostError::from)?;
        let device = self.open(admin, index, &volume).map_err(|source| {
            let log = self.host.log();
            CampaignError::Attach { volume, source, log }
        })?;
        let options = StreamOptions {
            seed: self.config.seed << 16 | index as u64,
            mix: self.config.mix.clone(),
            depth: self.config.depth as usize,
            stall_limit: self.config.stall_limit,
            tracks_durability,
            tears: self.copies_at_once(),
            ..StreamOptions::default()
        };
        Ok(Stream::new(device, index as u64, options, self.timeline.clone()))
    }

    /// `mem` copies on the thread of each queue, without a lock.
    fn copies_at_once(&self) -> bool {
        let queues = match &self.config.way {
            Way::Library => 1,
            Way::VhostUser { options, .. } => options.queues,
        };
        self.config.backend == "mem" && queues > 1
    }

    fn open(&mut self, admin: &Admin, index: usize, volume: &str) -> Opened {
        let depth = self.config.depth;
        let Way::VhostUser { options, churns } = &self.config.way else {
            let attach = AttachOptions { depth, ..AttachOptions::default() };
            return Ok(Box::new(ClientDevice::open(self.host.socket(), volume, &attach)?));
        };
        let socket = admin.attach(volume, options.queues as u32)?;
        let options = Options { socket, depth: depth as usize, ..options.clone() };
        let device = VhostDevice::open(&options)?;
        let driver = device.driver();
        driver.churn(churns.then_some(self.config.seed << 16 | index as u64));
        self.drivers.push(driver);
        Ok(Box::new(device))
    }
}
