//! The control queue: commands of the driver's, each answered with one byte (virtio 1.2, 5.1.6.5).

use cleave_runtime::{Chain, Command, GuestMemory, Inbox, Polling, Waiter};
use vm_memory::GuestAddress;

use super::{BATCH, Next, QueueError, Ring, Server, Work};
use crate::control::{ERR, MAX_COMMAND, OK};
use crate::shared::Shared;

/// Serves vrings of the control queue, one after the other, until the device is gone.
pub(crate) fn serve(waiter: &Waiter, inbox: &Inbox, shared: &Shared) {
    let mut polling = Polling::new(std::time::Duration::ZERO);
    while let Some(command) = inbox.next() {
        if let Command::Start(vring) = command {
            let mut commands = Commands { shared, chain: Chain::default() };
            let vring = Server { inbox, waiter, polling: &mut polling }.run(vring, &mut commands);
            inbox.give_back(vring);
        }
    }
}

struct Commands<'s> {
    shared: &'s Shared,
    chain: Chain,
}

impl Commands<'_> {
    /// Does what the chain of `head` says. Gives the bytes written.
    fn obey(&mut self, ring: &mut Ring, head: u16) -> u32 {
        if let Err(error) = ring.vring.read_chain(head, &mut self.chain) {
            ring.complain(&error);
            return 0;
        }
        let answer_to =
            self.chain.writable().iter().find(|segment| segment.len != 0).map(|segment| segment.addr);
        let Some(answer_to) = answer_to.filter(|addr| ring.vring.memory().slice(*addr, 1).is_some()) else {
            ring.complain(&"a control command has no room for its answer, or has it outside of memory");
            return 0;
        };
        let done = match words(&self.chain, ring.vring.memory()) {
            Some(words) => self.shared.command(&words).map_err(|error| error.to_string()),
            None => Err("a control command is too long, or outside of memory".to_owned()),
        };
        let answer = if done.is_ok() { OK } else { ERR };
        if let Err(what) = done {
            ring.complain(&what);
        }
        u32::from(write(ring.vring.memory(), answer_to, answer))
    }
}

fn write(memory: &GuestMemory, at: GuestAddress, byte: u8) -> bool {
    memory.write_obj(byte, at).is_ok()
}

fn words(chain: &Chain, memory: &GuestMemory) -> Option<Vec<u8>> {
    let len: usize = chain.readable().iter().map(|segment| segment.len as usize).sum();
    if len > MAX_COMMAND {
        return None;
    }
    let mut words = vec![0; len];
    let mut rest = &mut words[..];
    for segment in chain.readable() {
        let (part, behind) = rest.split_at_mut(segment.len as usize);
        memory.read(part, segment.addr).ok()?;
        rest = behind;
    }
    Some(words)
}

impl Work for Commands<'_> {
    fn turn(&mut self, ring: &mut Ring) -> Result<Next, QueueError> {
        for _ in 0..BATCH {
            let Some(head) = ring.vring.next_head()? else { return Ok(Next::Driver) };
            let written = self.obey(ring, head);
            ring.vring.push_used(head, written)?;
        }
        Ok(Next::Again)
    }

    fn end(&mut self, _: &mut Ring) {}
}
