//! The event queue's thread: puts events into the buffers that the driver has left for them.

use std::io;

use cleave_common::exit::ExitCode;
use cleave_runtime::{Chain, Command, Inbox, RingError, Vring};
use cleave_storage::{Engine, Event, WatchId};
use tracing::{error, warn};

use crate::controller::Controller;
use crate::events::Events;
use crate::request::write_all;

/// Serves vrings of the event queue, one after the other, until the device is gone.
pub(crate) fn serve(mut engine: Engine, inbox: &Inbox, controller: &Controller) {
    let command = engine.watch(inbox.wake_fd());
    let happened = engine.watch(controller.events.wake_fd());
    while let Some(first) = inbox.next() {
        let Command::Start(vring) = first else { continue };
        let kick = engine.watch(vring.kick_fd());
        let watches = [command, happened, kick];
        match serve_one(vring, &mut engine, inbox, &controller.events, watches) {
            Ok(vring) => {
                engine.unwatch(kick);
                inbox.give_back(vring);
            }
            Err(error) => {
                error!("the event queue is not served any more: {error}");
                std::process::exit(ExitCode::Host as i32);
            }
        }
    }
}

fn serve_one(
    mut vring: Vring,
    engine: &mut Engine,
    inbox: &Inbox,
    events: &Events,
    [command, _happened, kick]: [WatchId; 3],
) -> io::Result<Vring> {
    let mut chain = Chain::default();
    let mut broken = false;
    loop {
        if !broken && let Err(error) = tell(&mut vring, &mut chain, events) {
            warn!("{} is broken until it is set up again: {error}", vring.index());
            vring.signal_broken();
            broken = true;
        }
        engine.wait()?;
        while let Some(event) = engine.next_event() {
            match event {
                Event::Readable(id) if id == kick => vring.start(),
                Event::Readable(id) if id == command => {
                    if matches!(inbox.try_next(), Some(Command::Stop(_))) {
                        return Ok(vring);
                    }
                }
                _ => {}
            }
        }
    }
}

/// Tells what has happened, as far as there are buffers. They are fetched only then.
fn tell(vring: &mut Vring, chain: &mut Chain, events: &Events) -> Result<(), RingError> {
    if !vring.is_started() {
        return Ok(());
    }
    loop {
        if events.is_empty() {
            break;
        }
        let Some(head) = vring.next_head()? else {
            // A buffer that comes is to be heard of.
            if vring.enable_kicks()? {
                continue;
            }
            break;
        };
        let written = match vring.read_chain(head, chain) {
            Ok(()) => events.take().map_or(0, |event| {
                let put = write_all(chain.writable().iter().copied(), vring.memory(), &event);
                if put.is_ok() { event.len() as u32 } else { 0 }
            }),
            Err(_) => 0,
        };
        vring.push_used(head, written)?;
    }
    vring.signal_used()
}
