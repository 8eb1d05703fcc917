//! Guests that write nonsense: it costs them the chain, or the queue.

use std::io::Write;

use cleave_tests::driver::console::event;
use cleave_tests::driver::{Buffer, Flags};

use super::*;

fn works(serial: &mut Serial, client: &mut UnixStream) {
    serial.driver.write_all(1, b"still there\n").unwrap();
    read_until(client, "still there\n");
    client.write_all(b"so is this").unwrap();
    assert_eq!(serial.driver.read_exact(1, 10).unwrap(), b"so is this");
}

fn served() -> (Serial, UnixStream) {
    let mut serial = start(&["name=data,unix=@/data", "console,log=4K"]);
    serial.driver.open(1, true).unwrap();
    let client = serial.connect("data");
    (serial, client)
}

#[test]
fn control_messages_may_say_anything() {
    let (mut serial, mut client) = served();
    for length in 1..8 {
        serial.driver.tell_raw(&vec![0xff; length]).unwrap();
    }
    for what in [event::DEVICE_ADD, event::DEVICE_REMOVE, event::CONSOLE_PORT, event::RESIZE, 8, 0xffff] {
        serial.driver.tell(0, what, 1).unwrap();
    }
    for port in [7, 8, 31, 1 << 31, u32::MAX] {
        serial.driver.tell(port, event::PORT_READY, 1).unwrap();
        serial.driver.tell(port, event::PORT_OPEN, 1).unwrap();
    }
    for value in 0..200 {
        serial.driver.tell(1, event::PORT_READY, value % 3).unwrap();
        serial.driver.hear().unwrap();
    }
    serial.driver.tell(1, event::PORT_READY, 1).unwrap();
    works(&mut serial, &mut client);
    // It begins again, as often as it likes.
    for _ in 0..20 {
        serial.driver.ports.clear();
        serial.driver.come_up(2).unwrap();
    }
    serial.driver.open(1, true).unwrap();
    works(&mut serial, &mut client);
    assert!(serial.daemon.log().contains("is about a port that there is not"));
}

#[test]
fn chains_that_are_none_are_given_back() {
    let (mut serial, mut client) = served();
    let ram_end = serial.driver.ram.hole();
    let queue = 5;
    let bad = [
        Buffer::to_read(ram_end - 2, 4),
        Buffer::to_read(u64::MAX - 3, 16),
        Buffer::to_write(0x1000, 16),
        Buffer::to_read(0x1000, 0),
    ];
    for buffer in bad {
        assert_eq!(serial.driver.request(queue, &[buffer]).unwrap(), 0);
    }
    let mixed = [Buffer::to_read(0x1000, 4), Buffer::to_write(0x2000, 4)];
    assert_eq!(serial.driver.request(queue, &mixed).unwrap(), 0);
    assert_eq!(serial.driver.request(3, &[Buffer::to_write(0x1000, 64)]).unwrap(), 0);
    works(&mut serial, &mut client);
}

#[test]
fn a_buffer_to_receive_that_is_none_is_given_back_and_the_next_one_is_taken() {
    let (mut serial, mut client) = served();
    client.write_all(b"some").unwrap();
    let hole = serial.driver.ram.hole();
    assert_eq!(serial.driver.request(4, &[Buffer::to_write(hole, 64)]).unwrap(), 0);
    assert_eq!(serial.driver.request(4, &[Buffer::to_read(0x1000, 64)]).unwrap(), 0);
    assert_eq!(serial.driver.request(4, &[Buffer::to_write(0x1000, 64)]).unwrap(), 4);
}

#[test]
fn a_ring_that_is_broken_costs_its_port_only() {
    let (mut serial, _client) = served();
    serial.driver.queues[5].set_descriptor(&serial.driver.ram, 0, 0x1000, 16, Flags::NEXT, 0).unwrap();
    serial.driver.queues[5].set_avail_idx(&serial.driver.ram, 40_000).unwrap();
    serial.driver.queues[5].kick_now().unwrap();
    serial.daemon.wait_for_log("queue 5 is left alone").unwrap();
    serial.driver.write_all(0, b"the console goes on").unwrap();
}
