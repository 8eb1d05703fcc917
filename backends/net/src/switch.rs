//! A learning bridge between guests, and to the world by a tap device (IEEE 802.1D, without its spanning tree).
//!
//! ```text
//!   guest A's memory --A's transmit thread: one copy--> guest B's memory
//!          transmit queue --> forward --> B's inlet (a lock) --> receive queue     B's receive thread: interrupts, kicks
//! ```
//!
//! **The sender's thread copies**, from its guest's memory straight into a buffer that the receiver has posted. The other
//! way round, with frames that wait in the sender's memory until the receiver's thread fetches them, a receiver that
//! does not come would hold the sender's buffers; they would have to be taken away from it again, under its hands, by a
//! timer or when the sender stops. Here a frame is where it is to be, or dropped and counted, before its sender's thread goes
//! on: nothing is in flight between ports, so that stopping a queue is taking it from behind its lock, and a port that hangs,
//! stops or is hostile has nothing of anybody else's. Who floods pays for the copies, on a thread of its own. What it costs
//! is that there is no back-pressure: a receiver that is too slow loses frames, as at any switch.
//!
//! What could make a sender's thread wait for a receiver is kept from it: interrupts are raised by the receiver's own thread
//! ([`inlet`]), and guest memory has to be sealed memfds, whose pages are there and stay (a file can be cut off, which would end
//! the process, or be one of a file system whose server does not answer).
//!
//! Invariants: a thread holds one inlet's lock at most, and that of the table never beside it; no frame goes back where
//! it came from; between isolated ports goes nothing; what is decided by a frame's first bytes is decided by what the
//! receiver gets.

mod flow;
mod frame;
pub(crate) mod inlet;
mod offload;
mod options;
mod port;
mod start;
mod sum;
mod table;
mod uplink;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

pub(crate) use options::SwitchArgs;
pub(crate) use port::SwitchPort;
pub(crate) use start::{Common, refuse, refuse_for_now, serve};

use crate::config_space::feature;
use frame::Frame;
use inlet::Inlet;
use table::{GUESTS_SHARE, Recent, Table, UPLINKS_SHARE};
use uplink::Uplink;

/// Most ports with guests.
pub(crate) const MAX_PORTS: u16 = 64;

/// Addresses that bridges do not pass on (IEEE 802.1D, 7.12.6), but for the first one: no spanning tree is made here, and
/// whoever makes one finds loops.
const BRIDGES_OWN: [u8; 5] = [0x01, 0x80, 0xc2, 0x00, 0x00];
const SPANNING_TREE: u8 = 0;

/// Which port, from 0. The uplink's comes after those of all guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PortIndex(pub(crate) usize);

#[derive(Debug)]
struct Member {
    /// By pair of queues.
    inlets: Vec<Inlet>,
    /// A bit for each pair that takes frames.
    active: AtomicU64,
    /// Frames from here that were for nobody.
    for_nobody: AtomicU64,
}

#[derive(Debug)]
pub(crate) struct Switch {
    members: Vec<Member>,
    uplink: Option<Arc<Uplink>>,
    isolated: bool,
    table: Table,
    mtu: u16,
    since: Instant,
}

/// What a thread that sends keeps between frames.
#[derive(Debug, Default)]
pub(crate) struct Outlet {
    recent: Recent,
    /// Inlets that have got frames since the last flush.
    touched: Vec<(PortIndex, u16)>,
}

/// How a switch is to be.
#[derive(Debug)]
pub(crate) struct SwitchOptions {
    pub(crate) ports: usize,
    pub(crate) pairs: u16,
    pub(crate) isolated: bool,
    pub(crate) ageing: Duration,
    pub(crate) mtu: u16,
}

impl Switch {
    pub(crate) fn new(options: &SwitchOptions, uplink: Option<Arc<Uplink>>) -> std::io::Result<Self> {
        let member = |_| -> std::io::Result<Member> {
            let inlets = (0..options.pairs).map(|_| Inlet::new()).collect::<Result<_, _>>()?;
            Ok(Member { inlets, active: AtomicU64::new(0), for_nobody: AtomicU64::new(0) })
        };
        let mut shares = vec![GUESTS_SHARE; options.ports];
        shares.push(UPLINKS_SHARE);
        Ok(Self {
            members: (0..options.ports).map(member).collect::<Result<_, _>>()?,
            uplink,
            isolated: options.isolated,
            table: Table::new(shares, options.ageing),
            mtu: options.mtu,
            since: Instant::now(),
        })
    }

    fn features(&self) -> u64 {
        use feature as f;
        let tcp = f::HOST_TSO4 | f::HOST_TSO6 | f::HOST_ECN | f::GUEST_TSO4 | f::GUEST_TSO6 | f::GUEST_ECN;
        let udp = f::HOST_USO | f::GUEST_USO4 | f::GUEST_USO6;
        let all = f::CSUM | f::GUEST_CSUM | tcp | udp;
        // What the kernel behind the uplink cannot finish, guests may not leave unfinished.
        self.uplink.as_ref().map_or(all, |uplink| all & uplink.features())
    }

    fn mtu(&self) -> u16 {
        self.mtu
    }

    /// The uplink's port, whether there is one or not.
    fn uplink_index(&self) -> PortIndex {
        PortIndex(self.members.len())
    }

    fn inlet(&self, port: PortIndex, pair: u16) -> Option<&Inlet> {
        self.members.get(port.0)?.inlets.get(usize::from(pair))
    }

    /// Whether frames for `port` may go to its pair `pair`.
    fn set_active(&self, port: PortIndex, pair: u16, active: bool) {
        let (pairs, bit) = (&self.members[port.0].active, 1 << pair);
        if active {
            pairs.fetch_or(bit, Ordering::Relaxed)
        } else {
            pairs.fetch_and(!bit, Ordering::Relaxed)
        };
    }

    /// Takes a frame that has come in at `from` to where it is to go. [`Switch::flush`] is to come after, if not at once.
    pub(crate) fn forward(&self, from: PortIndex, frame: &Frame<'_>, outlet: &mut Outlet) {
        let now = self.since.elapsed();
        self.table.learn(now, frame.source(), from.0, &mut outlet.recent);
        let to = frame.destination();
        let taken = if to[0] & 1 == 1 {
            let for_bridges = to[..5] == BRIDGES_OWN && to[5] <= 0x0f && to[5] != SPANNING_TREE;
            !for_bridges && self.flood(from, frame, outlet)
        } else {
            match self.table.find(now, to, &mut outlet.recent).map(PortIndex) {
                Some(port) => self.may(from, port) && self.give(port, frame, outlet),
                None => self.flood(from, frame, outlet),
            }
        };
        if !taken {
            let count = self.members.get(from.0).map(|member| &member.for_nobody);
            let count = count.or(self.uplink.as_ref().map(|uplink| &uplink.for_nobody));
            count.map(|count| count.fetch_add(1, Ordering::Relaxed));
        }
    }

    /// Whether frames may go from one port to the other.
    fn may(&self, from: PortIndex, to: PortIndex) -> bool {
        let uplink = self.uplink_index();
        from != to && (!self.isolated || from == uplink || to == uplink)
    }

    /// To all that it may go to, and that are there. `false`: to nobody.
    fn flood(&self, from: PortIndex, frame: &Frame<'_>, outlet: &mut Outlet) -> bool {
        let is_there = |port: &PortIndex| {
            self.members.get(port.0).is_none_or(|member| member.active.load(Ordering::Relaxed) != 0)
        };
        let ports = (0..=self.members.len()).map(PortIndex);
        let mut taken = false;
        for port in ports.filter(|port| self.may(from, *port)).filter(is_there) {
            taken |= self.give(port, frame, outlet);
        }
        taken
    }

    /// `false`: there is no such port.
    fn give(&self, port: PortIndex, frame: &Frame<'_>, outlet: &mut Outlet) -> bool {
        let Some(member) = self.members.get(port.0) else {
            if let Some(uplink) = &self.uplink {
                uplink.send(frame);
            }
            return self.uplink.is_some();
        };
        let pair = choose(member.active.load(Ordering::Relaxed), || flow::hash(frame));
        let inlet = &member.inlets[usize::from(pair)];
        if inlet.deliver(frame) && !outlet.touched.contains(&(port, pair)) {
            outlet.touched.push((port, pair));
            // It can begin while others are on their way.
            inlet.call_if_due();
        }
        true
    }

    /// Has those interrupted that want to know of what they got.
    pub(crate) fn flush(&self, outlet: &mut Outlet) {
        for (port, pair) in outlet.touched.drain(..) {
            self.members[port.0].inlets[usize::from(pair)].call_if_due();
        }
    }

    /// What is worth knowing of a port, beyond what any network device says.
    fn report_of(&self, port: PortIndex) -> String {
        let member = &self.members[port.0];
        let missed: u64 = member.inlets.iter().map(Inlet::missed).sum();
        format!(
            "{missed} came while nobody took them, {} were for nobody; {} addresses",
            member.for_nobody.load(Ordering::Relaxed),
            self.table.counts()[port.0],
        )
    }

    /// What is worth knowing of all.
    pub(crate) fn report(&self) -> String {
        let counts = self.table.counts();
        let uplink = match &self.uplink {
            Some(uplink) => {
                format!("uplink {}; {} addresses", uplink.report(), counts[self.uplink_index().0])
            }
            None => "no uplink".to_owned(),
        };
        let isolated = if self.isolated { ", isolated" } else { "" };
        format!(
            "{} ports{isolated}, {} addresses; {uplink}",
            self.members.len(),
            counts.iter().sum::<usize>()
        )
    }
}

/// One of the pairs whose bits are set, always the same of one flow; the first one when there are none.
fn choose(active: u64, hash: impl FnOnce() -> u32) -> u16 {
    match active.count_ones() {
        0 => 0,
        1 => active.trailing_zeros() as u16,
        count => {
            let skip = hash() % count;
            let rest = (0..skip).fold(active, |rest, _| rest & (rest - 1));
            rest.trailing_zeros() as u16
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_goes_to_one_of_the_pairs_that_are_active() {
        assert_eq!(choose(0, || 5), 0);
        assert_eq!(choose(1 << 7, || 5), 7);
        let of = |hash| choose(0b1010_0001, || hash);
        assert_eq!([of(0), of(1), of(2), of(3)], [0, 5, 7, 0]);
        assert_eq!(choose(u64::MAX, || 63), 63);
    }
}
