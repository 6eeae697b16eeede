//! `null`: forgets writes, reads as zeros (the buffers are not touched: they are the client's own).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::{
    Backend, BackendError, Capabilities, Lane, OpenContext, Opened, PrepareContext, PreparedVolume,
    Request, Volume, VolumeSpec,
};

/// Volumes without storage, for measuring the way to it.
#[derive(Debug, Default)]
pub struct NullBackend;

struct NullVolume {
    size: AtomicU64,
}

impl Backend for NullBackend {
    fn kind(&self) -> &'static str {
        "null"
    }

    fn create(&self, spec: &VolumeSpec) -> Result<VolumeSpec, BackendError> {
        Ok(spec.clone())
    }

    fn delete(&self, _spec: &VolumeSpec) -> Result<(), BackendError> {
        Ok(())
    }

    fn observe(&self, spec: &VolumeSpec) -> Result<u64, BackendError> {
        Ok(spec.size)
    }

    fn open(&self, spec: &VolumeSpec, context: &OpenContext) -> Result<Opened, BackendError> {
        Ok(Opened {
            volume: Arc::new(NullVolume { size: AtomicU64::new(spec.size) }),
            major: context.previous_major.unwrap_or(context.host_major),
            volume_id: 0,
            incarnation: 0,
        })
    }

    fn prepare(
        &self,
        _spec: &VolumeSpec,
        _context: &PrepareContext,
    ) -> Result<Box<dyn PreparedVolume>, BackendError> {
        Ok(Box::new(Prepared))
    }
}

/// There is nothing to see.
struct Prepared;

impl PreparedVolume for Prepared {
    fn open(
        self: Box<Self>,
        spec: &VolumeSpec,
        context: &OpenContext,
    ) -> Result<Opened, BackendError> {
        NullBackend.open(spec, context)
    }
}

impl Volume for NullVolume {
    fn size(&self) -> u64 {
        self.size.load(Relaxed)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { discard: true, write_zeroes: true, fences: false }
    }

    fn submit(&self, lane: &mut Lane, request: Request) {
        request.complete(lane, Ok(()));
    }

    fn resize(&self, size: u64) -> Result<u64, BackendError> {
        self.size.store(size, Relaxed);
        Ok(size)
    }

    fn close(&self) {}

    fn relinquish(&self) {}
}
