//! The virtio-console device (virtio 1.2, 5.3): features, config space, and the way to the thread that serves it.

use std::error::Error;
use std::os::fd::BorrowedFd;
use std::sync::mpsc;

use cleave_common::virtio::DeviceType;
use cleave_runtime::{Device, Kept, QueueIndex, Stop, Vring};

use crate::kept;
use crate::ports::Size;
use crate::worker::{Command, Handle, MULTIPORT};

/// Feature bits (virtio 1.2, 5.3.3).
const SIZE: u64 = 1 << 0;
const EMERG_WRITE: u64 = 1 << 2;

/// Where config space has the byte to print (virtio 1.2, 5.3.4).
const EMERG_WR: usize = 8;

pub(crate) struct Console {
    worker: Handle,
    max_ports: u32,
    max_queue_size: u16,
}

impl Console {
    pub(crate) fn new(worker: Handle, max_ports: u32, max_queue_size: u16) -> Self {
        Self { worker, max_ports, max_queue_size }
    }
}

impl Device for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::CONSOLE
    }

    fn features(&self) -> u64 {
        SIZE | MULTIPORT | EMERG_WRITE
    }

    /// Two of each port, and two for control.
    fn num_queues(&self) -> u16 {
        2 * (self.max_ports as u16 + 1)
    }

    fn max_queue_size(&self) -> u16 {
        self.max_queue_size
    }

    fn ack_features(&mut self, features: u64) {
        self.worker.command(Command::Features(features));
    }

    fn config(&self) -> Vec<u8> {
        let Size { columns, rows } = self.worker.announced.size();
        let max = self.max_ports.to_le_bytes();
        [&columns.to_le_bytes()[..], &rows.to_le_bytes(), &max, &[0; 4]].concat()
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        match (offset, data.first()) {
            (EMERG_WR, Some(byte)) => {
                self.worker.command(Command::Print(*byte));
                Ok(())
            }
            _ => Err("of a console's config space only emerg_wr is to be written".into()),
        }
    }

    fn start_queue(&mut self, vring: Vring) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.worker.command(Command::Start(vring));
        Ok(())
    }

    /// However it is stopped, a chain that is not done comes again, and goes on where it was.
    fn stop_queue(&mut self, index: QueueIndex, _: Stop) -> Option<Vring> {
        let (reply, answer) = mpsc::channel();
        self.worker.command(Command::Stop(index, reply));
        answer.recv().ok().flatten()
    }

    fn report(&self) -> String {
        self.worker.ask(|worker| worker.report()).unwrap_or_default()
    }

    fn change_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.worker.announced.changed_fd())
    }

    fn take_change(&mut self) -> bool {
        self.worker.announced.take_change()
    }

    fn kept_len(&self) -> u64 {
        kept::Kept::LEN
    }

    fn set_kept(&mut self, kept: Kept) -> Result<(), Box<dyn Error + Send + Sync>> {
        let (reply, answer) = mpsc::channel();
        self.worker.command(Command::Kept(kept, reply));
        Ok(answer.recv()??)
    }

    fn reset(&mut self) {
        self.worker.command(Command::Reset);
    }
}
