//! The virtio-scsi device: what it offers, its config space, and one thread a queue.

use std::error::Error;
use std::sync::Arc;

use cleave_common::cpus::CpuList;
use cleave_common::exit::{ExitCode, Failure};
use cleave_common::virtio::DeviceType;
use cleave_runtime::cpus::{self, CpusError};
use cleave_runtime::{Device, QueueIndex, QueueThread, Stop, Vring};
use cleave_storage::{Engine, EngineError};
use tracing::debug;

use crate::config_space::{ConfigSpace, feature};
use crate::controller::Controller;
use crate::{control_queue, ctl, event_queue, queue};

/// Virtqueues before the request queues: control, events.
pub(crate) const FIRST_REQUEST_QUEUE: u16 = 2;

/// Most data buffers in one request: what fits into a queue of 128 entries beside request and response, so that a guest
/// without indirect descriptors never gets stuck.
const SEG_MAX: u16 = 126;

/// I/O that the threads of the first two queues have in flight: none, but descriptors to watch.
const WATCHES_ONLY: u16 = 16;

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ScsiError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("cannot start a queue's thread")]
    Thread(#[from] std::io::Error),
    #[error(transparent)]
    Cpus(#[from] CpusError),
}

impl From<ScsiError> for Failure {
    fn from(error: ScsiError) -> Self {
        let code = match &error {
            ScsiError::Cpus(CpusError::NotAllowed { .. }) => ExitCode::Usage,
            _ => ExitCode::Host,
        };
        Self::new(code, error)
    }
}

/// A SCSI host adapter with its units.
pub(crate) struct Scsi {
    controller: Arc<Controller>,
    num_queues: u16,
    max_queue_size: u16,
    acked_features: u64,
    /// Request queues that run.
    running: u64,
    queues: Vec<QueueThread>,
}

impl Scsi {
    /// With `num_queues` request queues.
    pub(crate) fn new(
        controller: Arc<Controller>,
        num_queues: u16,
        max_queue_size: u16,
        cpus: Option<CpuList>,
    ) -> Result<Self, ScsiError> {
        let watching = || Engine::without_image(WATCHES_ONLY).map_err(ScsiError::from);
        let shared = controller.clone();
        let control = QueueThread::spawn("control".to_owned(), watching, move |engine, inbox| {
            control_queue::serve(engine, &inbox, &shared);
        })?;
        let shared = controller.clone();
        let events = QueueThread::spawn("events".to_owned(), watching, move |engine, inbox| {
            event_queue::serve(engine, &inbox, &shared);
        })?;
        let mut queues = vec![control, events];
        for index in 0..num_queues {
            let (shared, cpus) = (controller.clone(), cpus.clone());
            queues.push(QueueThread::spawn(
                format!("queue{index}"),
                move || {
                    cpus.map_or(Ok(()), |cpus| cpus::pin(&cpus, index))?;
                    Engine::without_image(max_queue_size).map_err(ScsiError::from)
                },
                move |engine, inbox| queue::serve(index, engine, &inbox, &shared),
            )?);
        }
        Ok(Self { controller, num_queues, max_queue_size, acked_features: 0, running: 0, queues })
    }

    fn config_space(&self) -> ConfigSpace<'_> {
        ConfigSpace {
            num_queues: self.num_queues,
            seg_max: u32::from(SEG_MAX.min(self.max_queue_size.saturating_sub(2).max(1))),
            sizes: &self.controller.sizes,
        }
    }

    fn queue(&mut self, QueueIndex(index): QueueIndex) -> Option<&mut QueueThread> {
        self.queues.get_mut(usize::from(index))
    }

    fn bit(QueueIndex(index): QueueIndex) -> u64 {
        index.checked_sub(FIRST_REQUEST_QUEUE).map_or(0, |request| 1 << request)
    }
}

impl Device for Scsi {
    fn device_type(&self) -> DeviceType {
        DeviceType::SCSI
    }

    fn features(&self) -> u64 {
        feature::HOTPLUG | feature::CHANGE
    }

    fn num_queues(&self) -> u16 {
        FIRST_REQUEST_QUEUE + self.num_queues
    }

    fn max_queue_size(&self) -> u16 {
        self.max_queue_size
    }

    fn ack_features(&mut self, features: u64) {
        self.acked_features = features;
        self.controller.events.set_features(features);
    }

    fn config(&self) -> Vec<u8> {
        self.config_space().bytes().to_vec()
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        Ok(self.config_space().write(offset, data)?)
    }

    fn start_queue(&mut self, vring: Vring) -> Result<(), Box<dyn Error + Send + Sync>> {
        let index = vring.index();
        let bit = Self::bit(index);
        if bit != 0 && self.running == 0 {
            debug!("{index} is the first to run");
            self.controller.driver_starts(vring.continues());
        }
        let queue = self.queue(index).ok_or("no such queue")?;
        queue.start(vring);
        self.running |= bit;
        Ok(())
    }

    fn stop_queue(&mut self, index: QueueIndex, stop: Stop) -> Option<Vring> {
        self.running &= !Self::bit(index);
        self.queue(index)?.stop(stop)
    }

    fn reload(&mut self) -> Result<bool, Box<dyn Error + Send + Sync>> {
        // What units are like is told by their events, and not by config space.
        ctl::look_at_sizes(&self.controller)?;
        Ok(false)
    }

    fn report(&self) -> String {
        self.controller.report()
    }

    fn reset(&mut self) {
        self.acked_features = 0;
        self.controller.sizes.reset();
        self.controller.events.set_features(0);
        self.controller.events.forget();
    }
}
