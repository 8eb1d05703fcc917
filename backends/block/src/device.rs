//! The virtio-blk device: what it offers, its config space, and one thread a queue.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cleave_common::cpus::CpuList;
use cleave_common::exit::{ExitCode, Failure};
use cleave_common::virtio::DeviceType;
use cleave_runtime::{Device, QueueIndex, QueueThread, Stop, Vring};
use cleave_storage::{CacheMode, Engine, EngineError, Image, ImageError, Throttle};

use crate::config_space::{ConfigSpace, WRITEBACK, feature};
use crate::disk::{Disk, OnFull};
use crate::queue;
use cleave_runtime::cpus::{self, CpusError};

/// Most data buffers in one request: what fits into a queue of 128 entries beside header and status, so that a guest
/// without indirect descriptors never gets stuck.
const SEG_MAX: u16 = 126;

/// Most bytes in one buffer.
const SIZE_MAX: u32 = 4 << 20;

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BlockError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("cannot start a queue's thread")]
    Thread(#[from] std::io::Error),
    #[error(transparent)]
    Cpus(#[from] CpusError),
}

impl From<BlockError> for Failure {
    fn from(error: BlockError) -> Self {
        let code = match &error {
            BlockError::Image(image) if !image.is_hosts_fault() => ExitCode::Usage,
            BlockError::Cpus(CpusError::NotAllowed { .. }) => ExitCode::Usage,
            _ => ExitCode::Host,
        };
        Self::new(code, error)
    }
}

#[derive(Debug)]
pub(crate) struct BlockOptions {
    pub(crate) num_queues: u16,
    pub(crate) max_queue_size: u16,
    pub(crate) serial: String,
    pub(crate) on_full: OnFull,
    /// How long a queue's thread may look for work before it sleeps.
    pub(crate) poll: Duration,
    pub(crate) throttle: Option<Throttle>,
    /// Where the queues' threads run, if not anywhere.
    pub(crate) cpus: Option<CpuList>,
}

/// A disk image as a virtio device.
pub(crate) struct Block {
    image: Arc<Image>,
    disk: Arc<Disk>,
    num_queues: u16,
    max_queue_size: u16,
    acked_features: u64,
    /// The guest's switch in config space.
    writeback: bool,
    queues: Vec<QueueThread>,
}

impl Block {
    pub(crate) fn new(image: Image, options: BlockOptions) -> Result<Self, BlockError> {
        let BlockOptions { num_queues, max_queue_size, serial, on_full, poll, throttle, cpus } = options;
        let image = Arc::new(image);
        let disk = Arc::new(Disk::new(&image, num_queues, serial, on_full, poll, throttle)?);
        let queues = (0..num_queues)
            .map(|index| spawn_queue(index, &image, &disk, max_queue_size, cpus.clone()))
            .collect::<Result<_, _>>()?;
        let writeback = initial_writeback(&image);
        Ok(Self { image, disk, num_queues, max_queue_size, acked_features: 0, writeback, queues })
    }

    fn config_space(&self) -> ConfigSpace {
        ConfigSpace {
            capacity: self.image.len() / 512,
            size_max: SIZE_MAX,
            seg_max: u32::from(SEG_MAX.min(self.max_queue_size.saturating_sub(2).max(1))),
            blk_size: self.image.logical_block(),
            physical_block: self.image.physical_block(),
            topology: self.image.topology(),
            writeback: self.writeback,
            num_queues: self.num_queues,
            deallocates: !self.image.is_read_only(),
        }
    }

    /// A guest that knows neither of flushes nor of the switch takes a completed write to be safe (virtio 1.2, 5.2.6.2).
    fn apply_write_cache(&self) {
        let knows = self.acked_features & (feature::FLUSH | feature::CONFIG_WCE) != 0;
        self.disk.durable.store(!(knows && self.writeback), Ordering::Relaxed);
    }

    fn queue(&mut self, index: QueueIndex) -> Option<&mut QueueThread> {
        self.queues.get_mut(usize::from(index.0))
    }
}

fn initial_writeback(image: &Image) -> bool {
    image.cache() != CacheMode::Writethrough
}

fn spawn_queue(
    index: u16,
    image: &Arc<Image>,
    disk: &Arc<Disk>,
    size: u16,
    cpus: Option<CpuList>,
) -> Result<QueueThread, BlockError> {
    let (image, disk) = (image.clone(), disk.clone());
    QueueThread::spawn(
        format!("queue{index}"),
        move || {
            cpus.map_or(Ok(()), |cpus| cpus::pin(&cpus, index))?;
            Engine::new(image, size).map_err(BlockError::from)
        },
        move |engine, inbox| queue::serve(index, engine, &inbox, &disk),
    )
}

impl Device for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::BLOCK
    }

    fn features(&self) -> u64 {
        let always = feature::SIZE_MAX | feature::SEG_MAX | feature::BLK_SIZE | feature::TOPOLOGY;
        let mq = if self.num_queues > 1 { feature::MQ } else { 0 };
        let writes = if self.image.is_read_only() {
            feature::RO
        } else {
            feature::FLUSH | feature::CONFIG_WCE | feature::DISCARD | feature::WRITE_ZEROES
        };
        always | mq | writes
    }

    fn num_queues(&self) -> u16 {
        self.num_queues
    }

    fn max_queue_size(&self) -> u16 {
        self.max_queue_size
    }

    fn ack_features(&mut self, features: u64) {
        // The same features again are a frontend that came back: what its guest has switched stays.
        let changed = std::mem::replace(&mut self.acked_features, features) != features;
        if changed && features & (feature::FLUSH | feature::CONFIG_WCE) == feature::CONFIG_WCE {
            // A guest that knows the switch but cannot flush finds the cache off (virtio 1.2, 5.2.5.2).
            self.writeback = false;
        }
        self.apply_write_cache();
    }

    fn config(&self) -> Vec<u8> {
        self.config_space().bytes().to_vec()
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        let old = self.config();
        let mut new = old.clone();
        new[offset..offset + data.len()].copy_from_slice(data);
        let others_same =
            old.iter().zip(&new).enumerate().all(|(at, (old, new))| at == WRITEBACK || old == new);
        if !others_same || self.acked_features & feature::CONFIG_WCE == 0 || new[WRITEBACK] > 1 {
            return Err(
                "only the write cache can be switched, off or on, by a guest that has acknowledged it".into(),
            );
        }
        self.writeback = new[WRITEBACK] == 1;
        self.apply_write_cache();
        Ok(())
    }

    fn start_queue(&mut self, vring: Vring) -> Result<(), Box<dyn Error + Send + Sync>> {
        let index = vring.index();
        let queue = self.queue(index).ok_or("no such queue")?;
        queue.start(vring);
        Ok(())
    }

    fn stop_queue(&mut self, index: QueueIndex, stop: Stop) -> Option<Vring> {
        self.queue(index)?.stop(stop)
    }

    fn reload(&mut self) -> Result<bool, Box<dyn Error + Send + Sync>> {
        let changed = self.image.reload();
        self.disk.resize(self.image.len());
        // What waits for room on the disk may have some by now.
        self.disk.admission.nudges().nudge_all();
        Ok(changed?)
    }

    fn report(&self) -> String {
        self.disk.report()
    }

    fn reset(&mut self) {
        self.acked_features = 0;
        self.writeback = initial_writeback(&self.image);
        self.apply_write_cache();
    }
}
