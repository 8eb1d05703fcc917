//! What the kernel knows of a network interface, by rtnetlink(7): asked, changed and watched. It is the network
//! namespace's own word, where /sys may be mounted from another one.
//!
//! Five attributes of one kind of message, so the codec is here: those of crates refuse messages of kernels that are newer
//! than they are.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, send, socket_with,
};

/// Most bytes of an answer.
const MAX_ANSWER: usize = 32 << 10;

const HEADER_LEN: usize = 16;
const INFO_LEN: usize = 16;

/// Attributes (if_link.h).
mod attribute {
    pub(super) const ADDRESS: u16 = 1;
    pub(super) const IFNAME: u16 = 3;
    pub(super) const MTU: u16 = 4;
    pub(super) const MASTER: u16 = 10;
    pub(super) const LINKINFO: u16 = 18;
    /// Inside of it.
    pub(super) const INFO_KIND: u16 = 1;
    pub(super) const IFALIAS: u16 = 20;
    pub(super) const CARRIER: u16 = 33;
}

/// An interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) up: bool,
    /// One of the TUN/TAP driver's.
    pub(super) is_tun: bool,
    /// Somebody has the tap device open.
    pub(super) carrier: bool,
    pub(super) mtu: u32,
    /// The index of the bridge that it is a port of.
    pub(super) master: Option<u32>,
    pub(super) alias: Vec<u8>,
    pub(super) address: Vec<u8>,
}

/// What may be changed of one.
#[derive(Debug)]
pub(super) enum Change<'a> {
    Up,
    Mtu(u32),
    Master(u32),
    Alias(&'a str),
}

/// The way to ask, and to hear of changes.
#[derive(Debug)]
pub(super) struct Links {
    requests: OwnedFd,
    changes: OwnedFd,
}

impl Links {
    pub(super) fn open() -> io::Result<Self> {
        let socket = |flags: SocketFlags, groups: i32| -> io::Result<OwnedFd> {
            let flags = SocketFlags::CLOEXEC | flags;
            let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
            bind(&socket, &SocketAddrNetlink::new(0, groups as u32))?;
            Ok(socket)
        };
        Ok(Self {
            requests: socket(SocketFlags::empty(), 0)?,
            changes: socket(SocketFlags::NONBLOCK, libc::RTMGRP_LINK)?,
        })
    }

    /// Readable when an interface, any one, has changed.
    pub(super) fn changes_fd(&self) -> BorrowedFd<'_> {
        self.changes.as_fd()
    }

    /// What has changed is asked for, not read: so nothing is lost when too much did.
    pub(super) fn forget_changes(&self) {
        let mut bytes = [0; 64];
        // Bounded: others may change theirs without end. ENOBUFS says that some were dropped.
        for _ in 0..64 {
            match recv(&self.changes, &mut bytes, RecvFlags::TRUNC) {
                Ok(_) | Err(rustix::io::Errno::NOBUFS) => {}
                Err(_) => return,
            }
        }
    }

    /// The interface `name`, if there is one.
    pub(super) fn get(&self, name: &str) -> io::Result<Option<Link>> {
        let mut message = Message::new(libc::RTM_GETLINK, 0, 0, false);
        message.attribute(attribute::IFNAME, &[name.as_bytes(), &[0]].concat());
        self.found(message)
    }

    /// The interface of this index, whatever its name is by now.
    pub(super) fn by_index(&self, index: u32) -> io::Result<Option<Link>> {
        self.found(Message::new(libc::RTM_GETLINK, index, 0, false))
    }

    fn found(&self, message: Message) -> io::Result<Option<Link>> {
        match self.ask(message) {
            Ok(answer) => Ok(Some(parse(&answer)?)),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) fn change(&self, index: u32, change: &Change<'_>) -> io::Result<()> {
        let flags = if matches!(change, Change::Up) { libc::IFF_UP as u32 } else { 0 };
        let mut message = Message::new(libc::RTM_NEWLINK, index, flags, true);
        match change {
            Change::Up => {}
            Change::Mtu(mtu) => message.attribute(attribute::MTU, &mtu.to_ne_bytes()),
            Change::Master(bridge) => message.attribute(attribute::MASTER, &bridge.to_ne_bytes()),
            Change::Alias(alias) => message.attribute(attribute::IFALIAS, alias.as_bytes()),
        }
        self.ask(message).map(drop)
    }

    /// Sends a request. The kernel answers while it takes it.
    fn ask(&self, message: Message) -> io::Result<Vec<u8>> {
        send(&self.requests, &message.finish(), SendFlags::empty())?;
        let mut answer = vec![0; MAX_ANSWER];
        let (_, len) = recv(&self.requests, &mut answer[..], RecvFlags::empty())?;
        answer.truncate(len);
        let (kind, error) = (field::<2>(&answer, 4), field::<4>(&answer, HEADER_LEN));
        match (kind.map(u16::from_ne_bytes), error.map(i32::from_ne_bytes)) {
            (Some(kind), Some(0)) if kind == libc::NLMSG_ERROR as u16 => Ok(answer),
            (Some(kind), Some(error)) if kind == libc::NLMSG_ERROR as u16 => {
                Err(io::Error::from_raw_os_error(error.saturating_neg()))
            }
            (Some(_), Some(_)) => Ok(answer),
            _ => Err(odd()),
        }
    }
}

fn odd() -> io::Error {
    io::Error::other("the kernel's answer about a network interface makes no sense")
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

/// A request that is being written.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, index: u32, flags: u32, acknowledge: bool) -> Self {
        let ack = if acknowledge { libc::NLM_F_ACK } else { 0 };
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(((libc::NLM_F_REQUEST | ack) as u16).to_ne_bytes());
        // Sequence number and port: one request at a time, and the kernel knows us.
        bytes.extend([0; 8]);
        // Family and type: any.
        bytes.extend([0; 4]);
        bytes.extend(index.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        // Which flags are meant.
        bytes.extend(flags.to_ne_bytes());
        Self(bytes)
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.0.extend((4 + value.len() as u16).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        let len = self.0.len() as u32;
        self.0[..4].copy_from_slice(&len.to_ne_bytes());
        self.0
    }
}

fn parse(answer: &[u8]) -> io::Result<Link> {
    let number = |bytes: &[u8]| bytes.try_into().map(u32::from_ne_bytes).map_err(|_| odd());
    let word = |at| field(answer, HEADER_LEN + at).map(u32::from_ne_bytes).ok_or_else(odd);
    let mut link = Link { index: word(4)?, up: word(8)? & libc::IFF_UP as u32 != 0, ..Link::default() };
    let rest = answer.get(HEADER_LEN + INFO_LEN..).ok_or_else(odd)?;
    each_attribute(rest, |kind, value| {
        match kind {
            attribute::ADDRESS => link.address = value.to_vec(),
            attribute::MTU => link.mtu = number(value)?,
            attribute::MASTER => link.master = Some(number(value)?),
            attribute::IFALIAS => link.alias = text(value).to_vec(),
            attribute::CARRIER => link.carrier = value.first().is_some_and(|on| *on != 0),
            attribute::LINKINFO => each_attribute(value, |kind, value| {
                link.is_tun |= kind == attribute::INFO_KIND && text(value) == b"tun";
                Ok(())
            })?,
            _ => {}
        }
        Ok(())
    })?;
    Ok(link)
}

fn each_attribute(mut rest: &[u8], mut each: impl FnMut(u16, &[u8]) -> io::Result<()>) -> io::Result<()> {
    while let (Some(len), Some(kind)) = (field::<2>(rest, 0), field::<2>(rest, 2)) {
        let len = usize::from(u16::from_ne_bytes(len));
        // The uppermost bits say how the value is written.
        each(u16::from_ne_bytes(kind) & 0x3fff, rest.get(4..len).ok_or_else(odd)?)?;
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Ok(())
}

/// A text without the NUL behind it.
fn text(value: &[u8]) -> &[u8] {
    value.split(|byte| *byte == 0).next().unwrap_or(&[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_interface_is_what_everybody_knows() {
        let links = Links::open().unwrap();
        let lo = links.get("lo").unwrap().unwrap();
        assert_eq!((lo.index, lo.address, lo.master), (1, vec![0; 6], None));
        assert!(lo.mtu >= 1500);
        assert_eq!(links.by_index(1).unwrap().unwrap().index, 1);
        assert_eq!(links.get("no-such-device").unwrap(), None);
        assert_eq!(links.by_index(u32::MAX >> 1).unwrap(), None);
        links.forget_changes();
        let error = links.change(u32::MAX >> 1, &Change::Mtu(1500)).unwrap_err();
        // Without privileges the one, with them the other.
        assert!(matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENODEV)), "{error}");
    }

    #[test]
    fn answers_that_are_cut_off_are_refused() {
        let mut message = Message::new(libc::RTM_NEWLINK, 7, 1, false);
        message.attribute(attribute::MTU, &1400u32.to_ne_bytes());
        message.attribute(attribute::IFALIAS, b"abc\0");
        let bytes = message.finish();
        let link = parse(&bytes).unwrap();
        assert_eq!((link.index, link.up, link.mtu, &link.alias[..]), (7, true, 1400, &b"abc"[..]));
        for len in 0..HEADER_LEN + INFO_LEN {
            assert!(parse(&bytes[..len]).is_err(), "{len}");
        }
        for len in HEADER_LEN + INFO_LEN..bytes.len() {
            let _ = parse(&bytes[..len]);
        }
        let mut short = bytes.clone();
        short[HEADER_LEN + INFO_LEN] = 6;
        assert!(parse(&short).is_err(), "an MTU of two bytes");
    }
}
