//! The virtio-balloon device: what it offers, which queue is for what, and one thread a queue.

use std::error::Error;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use cleave_common::exit::{ExitCode, Failure};
use cleave_common::virtio::DeviceType;
use cleave_runtime::{Device, QueueIndex, QueueThread, Stop, Vring, Waiter};
use rustix::event::epoll::EventFlags;

use crate::config_space::{ACTUAL, POISON_VAL, feature};
use crate::queue::pages::{Direction, Pages};
use crate::queue::statistics::Answers;
use crate::queue::{InTurn, hinting::Hinted, reporting::Reports, serve};
use crate::roles::{Role, role};
use crate::shared::{Mib, Shared};

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BalloonError {
    #[error("cannot start a queue's thread")]
    Thread(#[from] io::Error),
}

impl From<BalloonError> for Failure {
    fn from(error: BalloonError) -> Self {
        Self::new(ExitCode::Host, error)
    }
}

pub(crate) struct Balloon {
    shared: Arc<Shared>,
    max_queue_size: u16,
    /// Whether the driver may report free pages.
    reporting: bool,
    /// By role.
    threads: Vec<QueueThread>,
    /// By index: what a queue that runs is for.
    running: [Option<Role>; Role::ALL.len()],
}

impl Balloon {
    pub(crate) fn new(
        shared: Arc<Shared>,
        max_queue_size: u16,
        reporting: bool,
    ) -> Result<Self, BalloonError> {
        let threads = Role::ALL.into_iter().map(|role| spawn(&shared, role)).collect::<Result<_, _>>()?;
        Ok(Self { shared, max_queue_size, reporting, threads, running: [None; Role::ALL.len()] })
    }
}

fn spawn(shared: &Arc<Shared>, role: Role) -> Result<QueueThread, BalloonError> {
    let (prepared, shared) = (shared.clone(), shared.clone());
    QueueThread::spawn(
        role.name().to_owned(),
        move || {
            let waiter = Waiter::new()?;
            if role == Role::Statistics {
                waiter.watch_other(prepared.ask_fd(), EventFlags::IN)?;
            }
            Ok::<_, BalloonError>(waiter)
        },
        move |waiter, inbox| match role {
            Role::Inflate => {
                serve(&waiter, &inbox, &mut InTurn::new(Pages::new(&shared, Direction::Inflate)));
            }
            Role::Deflate => {
                serve(&waiter, &inbox, &mut InTurn::new(Pages::new(&shared, Direction::Deflate)));
            }
            Role::Statistics => serve(&waiter, &inbox, &mut Answers::new(&shared)),
            Role::Hinting => serve(&waiter, &inbox, &mut InTurn::new(Hinted(&shared))),
            Role::Reporting => serve(&waiter, &inbox, &mut InTurn::new(Reports(&shared))),
        },
    )
}

impl Device for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::BALLOON
    }

    fn features(&self) -> u64 {
        use feature as f;
        let reporting = if self.reporting { f::REPORTING } else { 0 };
        f::STATS_VQ | f::DEFLATE_ON_OOM | f::FREE_PAGE_HINT | f::PAGE_POISON | reporting
    }

    fn num_queues(&self) -> u16 {
        Role::ALL.len() as u16
    }

    fn max_queue_size(&self) -> u16 {
        self.max_queue_size
    }

    fn ack_features(&mut self, features: u64) {
        self.shared.set_features(features);
    }

    fn config(&self) -> Vec<u8> {
        self.shared.config().bytes().to_vec()
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        let value: [u8; 4] =
            data.try_into().map_err(|_| format!("{} bytes: its fields have 4", data.len()))?;
        match offset {
            ACTUAL => self.shared.set_actual(u32::from_le_bytes(value)),
            POISON_VAL => self.shared.set_poison(u32::from_le_bytes(value)),
            _ => return Err(format!("byte {offset} of a balloon's config space is no field to write").into()),
        }
        Ok(())
    }

    fn start_queue(&mut self, vring: Vring) -> Result<(), Box<dyn Error + Send + Sync>> {
        let index = vring.index();
        let runs = |other: u16| self.running.get(usize::from(other)).is_some_and(Option::is_some);
        let role = role(index.0, self.shared.features(), runs);
        let role = role.ok_or("the driver's features know no such queue")?;
        if self.running.contains(&Some(role)) {
            return Err(format!("the {} queue runs already, by another number", role.name()).into());
        }
        let memory = {
            let mut host = self.shared.host();
            if role == Role::Inflate && vring.is_fresh() {
                host.forget();
            }
            host.enter(&vring)
        };
        self.shared.set_memory(memory);
        self.running[usize::from(index.0)] = Some(role);
        self.threads[role as usize].start(vring);
        Ok(())
    }

    fn stop_queue(&mut self, index: QueueIndex, stop: Stop) -> Option<Vring> {
        let role = self.running.get_mut(usize::from(index.0))?.take()?;
        let vring = self.threads[role as usize].stop(stop);
        let mut host = self.shared.host();
        host.leave(index);
        if stop == Stop::SessionOver {
            // The next frontend may have another guest.
            host.forget();
        }
        vring
    }

    fn report(&self) -> String {
        let status = self.shared.status();
        let pages = |count: u32| Mib(u64::from(count) << 12);
        format!(
            "the balloon has {} and is to have {}; {}",
            pages(status.config.actual),
            pages(status.config.num_pages),
            self.shared.counters.counts()
        )
    }

    fn change_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.shared.changed_fd())
    }

    fn take_change(&mut self) -> bool {
        self.shared.take_change()
    }

    fn reset(&mut self) {
        self.shared.reset();
    }
}
