//! The virtio-net device: what it offers, which queue is for what, and one thread a queue.
//!
//! Queues 2N and 2N + 1 receive and transmit for pair N. The control queue comes after those of all pairs, or of the first
//! one alone when the driver does not know of more (virtio 1.2, 5.1.2).

use std::error::Error;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use cleave_common::cpus::CpuList;
use cleave_common::exit::{ExitCode, Failure};
use cleave_common::mac::MacAddress;
use cleave_common::throttle::NetThrottleConfig;
use cleave_common::virtio::DeviceType;
use cleave_runtime::cpus::{self, CpusError};
use cleave_runtime::{Device, QueueIndex, QueueThread, Stop, Vring, Waiter};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use tracing::Span;

use crate::checkpoint::Checkpoint;
use crate::config_space::feature;
use crate::counters::Total;
use crate::pcap::{Capture, Output};
use crate::port::Port;
use crate::queue::{control, receive, transmit};
use crate::shared::Shared;

/// Most pairs of queues.
pub(crate) const MAX_PAIRS: u16 = 64;

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetError {
    #[error("cannot start a queue's thread")]
    Thread(#[from] io::Error),
    #[error(transparent)]
    Cpus(#[from] CpusError),
}

impl From<NetError> for Failure {
    fn from(error: NetError) -> Self {
        let code = match &error {
            NetError::Cpus(CpusError::NotAllowed { .. }) => ExitCode::Usage,
            _ => ExitCode::Host,
        };
        Self::new(code, error)
    }
}

#[derive(Debug)]
pub(crate) struct NetOptions {
    pub(crate) mac: MacAddress,
    pub(crate) pairs: u16,
    pub(crate) max_queue_size: u16,
    /// How long a queue's thread may look for work before it sleeps.
    pub(crate) poll: Duration,
    /// Where the queues' threads run, if not anywhere.
    pub(crate) cpus: Option<CpuList>,
    pub(crate) throttle: NetThrottleConfig,
    /// Where frames are captured, and how much of each.
    pub(crate) capture: Option<(Output, u32)>,
}

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Receive(u16),
    Transmit(u16),
    Control,
}

/// A port as a virtio device.
pub(crate) struct Net {
    shared: Arc<Shared>,
    max_queue_size: u16,
    /// Of each pair both, then the control queue's.
    threads: Vec<QueueThread>,
    /// An epoll set of all that says that config space may have changed.
    changes: OwnedFd,
}

impl Net {
    pub(crate) fn new(port: Arc<dyn Port>, options: NetOptions) -> Result<Self, NetError> {
        let NetOptions { mac, pairs, max_queue_size, poll, cpus, throttle, capture } = options;
        let capture = capture.map(|(output, snaplen)| Capture::start(output, snaplen)).transpose()?;
        let checkpoint = Checkpoint::new(&throttle, capture);
        let shared = Arc::new(Shared::new(port, mac, pairs, poll, checkpoint)?);
        let mut threads = Vec::new();
        for pair in 0..pairs {
            threads.push(spawn(&shared, Role::Receive(pair), cpus.clone())?);
            threads.push(spawn(&shared, Role::Transmit(pair), cpus.clone())?);
        }
        threads.push(spawn(&shared, Role::Control, None)?);
        let changes = watch_changes(&shared)?;
        Ok(Self { shared, max_queue_size, threads, changes })
    }

    fn pairs(&self) -> u16 {
        self.shared.max_pairs
    }

    /// What queue `index` is for, to the driver whose features these are.
    fn role(&self, index: QueueIndex) -> Option<Role> {
        let features = self.shared.features();
        let pairs = if features & feature::MQ != 0 { self.pairs() } else { 1 };
        match index.0 {
            control if control == 2 * pairs => (features & feature::CTRL_VQ != 0).then_some(Role::Control),
            other if other > 2 * pairs => None,
            receive if receive % 2 == 0 => Some(Role::Receive(receive / 2)),
            transmit => Some(Role::Transmit(transmit / 2)),
        }
    }

    fn thread(&mut self, role: Role) -> &mut QueueThread {
        let at = match role {
            Role::Receive(pair) => 2 * pair,
            Role::Transmit(pair) => 2 * pair + 1,
            Role::Control => 2 * self.pairs(),
        };
        &mut self.threads[usize::from(at)]
    }
}

fn watch_changes(shared: &Shared) -> io::Result<OwnedFd> {
    let changes = epoll::create(CreateFlags::CLOEXEC)?;
    for fd in [Some(shared.changed_fd()), shared.port.link_fd()].into_iter().flatten() {
        epoll::add(&changes, fd, EventData::new_u64(0), EventFlags::IN)?;
    }
    Ok(changes)
}

fn spawn(shared: &Arc<Shared>, role: Role, cpus: Option<CpuList>) -> Result<QueueThread, NetError> {
    let (prepared, shared) = (shared.clone(), shared.clone());
    // Of several devices in this process each has its name in what its threads say.
    let named = Span::current();
    let (name, number) = match role {
        Role::Receive(pair) => (format!("rx{pair}"), 2 * pair),
        Role::Transmit(pair) => (format!("tx{pair}"), 2 * pair + 1),
        Role::Control => ("control".to_owned(), 0),
    };
    QueueThread::spawn(
        name,
        move || {
            cpus.map_or(Ok(()), |cpus| cpus::pin(&cpus, number))?;
            match role {
                Role::Receive(pair) => match prepared.port.inlet(pair) {
                    Some(inlet) => inlet.waiter(),
                    None => receive::waiter(pair, &prepared),
                },
                Role::Transmit(pair) => transmit::waiter(pair, &prepared),
                Role::Control => Waiter::new(),
            }
            .map_err(NetError::from)
        },
        move |waiter, inbox| {
            if let Err(error) = waiter.watch_wake(inbox.wake_fd()) {
                // It would never hear of a stop.
                tracing::error!("a queue's thread cannot wait for commands: {error}");
                std::process::exit(ExitCode::Host as i32);
            }
            let _named = named.enter();
            match role {
                Role::Receive(pair) => match shared.port.inlet(pair) {
                    Some(inlet) => inlet.serve(pair, &waiter, &inbox, &shared),
                    None => receive::serve(pair, &waiter, &inbox, &shared),
                },
                Role::Transmit(pair) => transmit::serve(pair, &waiter, &inbox, &shared),
                Role::Control => control::serve(&waiter, &inbox, &shared),
            }
        },
    )
}

impl Device for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::NET
    }

    fn features(&self) -> u64 {
        use feature as f;
        let control = f::CTRL_VQ | f::CTRL_RX | f::CTRL_RX_EXTRA | f::CTRL_VLAN | f::CTRL_MAC_ADDR;
        let mq = if self.pairs() > 1 { f::MQ } else { 0 };
        let config = f::MAC | f::MTU | f::STATUS | f::GUEST_ANNOUNCE;
        self.shared.port.features() | f::MRG_RXBUF | control | mq | config
    }

    fn num_queues(&self) -> u16 {
        2 * self.pairs() + 1
    }

    fn needs_sealed_memory(&self) -> bool {
        self.shared.port.inlet(0).is_some()
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

    fn write_config(&mut self, _: usize, _: &[u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        Err("a network device's config space is read-only: its address is set by its control queue".into())
    }

    fn start_queue(&mut self, vring: Vring) -> Result<(), Box<dyn Error + Send + Sync>> {
        let role = self.role(vring.index()).ok_or("the driver's features know no such queue")?;
        // Here, for rings may start without features being set again; the same ones again change nothing.
        self.shared.port.configure(self.shared.features())?;
        match role {
            Role::Receive(pair) => self.shared.receiver_starts(pair, vring.is_fresh()),
            Role::Control => self.shared.control_starts(vring.is_fresh()),
            Role::Transmit(_) => {}
        }
        self.thread(role).start(vring);
        Ok(())
    }

    fn stop_queue(&mut self, index: QueueIndex, stop: Stop) -> Option<Vring> {
        let role = self.role(index)?;
        let vring = self.thread(role).stop(stop);
        match role {
            Role::Receive(pair) => self.shared.receiver_stops(pair),
            Role::Control => self.shared.control_stops(),
            Role::Transmit(_) => {}
        }
        vring
    }

    fn report(&self) -> String {
        // Not the port's word: asking it takes away what says that the link has changed.
        let link = if self.shared.link_is_up() { "up" } else { "down" };
        let port = self.shared.port.report().map(|report| format!("; {report}")).unwrap_or_default();
        let capture = self.shared.checkpoint.report().map(|words| format!("; {words}")).unwrap_or_default();
        format!("the link is {link}{port}; {}{capture}", Total(&self.shared.counters))
    }

    fn change_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.changes.as_fd())
    }

    fn take_change(&mut self) -> bool {
        self.shared.look_again()
    }

    fn reset(&mut self) {
        self.shared.reset();
    }
}
