//! Consoles: several clients, what was printed before they came, sizes, EMERG_WRITE, drivers without MULTIPORT.

use std::io::Write;
use std::os::fd::AsFd;

use cleave_common::port::send_terminal;
use cleave_tests::driver::Frontend;
use cleave_tests::driver::console::{CHUNK, MULTIPORT};
use rustix::pty::{OpenptFlags, openpt};
use rustix::termios::{Winsize, tcsetwinsize};

use super::*;

#[test]
fn all_clients_see_what_is_printed_and_any_of_them_types() {
    let mut serial = start(&["console,unix=@/tty"]);
    serial.driver.hear_until(|driver| driver.port(0).console).unwrap();
    serial.driver.open(0, true).unwrap();
    let mut clients = [serial.connect("tty"), serial.connect("tty"), serial.connect("tty")];
    // Until all are there.
    serial.driver.write_all(0, b"login: ").unwrap();
    for (at, client) in clients.iter_mut().enumerate() {
        client.write_all(&[b'a' + at as u8]).unwrap();
    }
    let mut typed = serial.driver.read_exact(0, 3).unwrap();
    typed.sort_unstable();
    assert_eq!(typed, b"abc");
    serial.driver.write_all(0, b"root\r\n").unwrap();
    for client in &mut clients {
        read_until(client, "root\r\n");
    }
}

#[test]
fn who_attaches_sees_what_nobody_has_seen_and_the_history_that_was_asked_for() {
    let mut serial = start(&["console,unix=@/tty,history=1K", "console,unix=@/bare"]);
    for port in [0, 1] {
        serial.driver.open(port, true).unwrap();
        serial.driver.write_all(port, b"printed before anybody came\r\n").unwrap();
        let name = if port == 0 { "tty" } else { "bare" };
        read_until(&mut serial.connect(name), "anybody came\r\n");
    }
    serial.driver.write_all(0, &[b'x'; 1000]).unwrap();
    let seen = read_until(&mut serial.connect("tty"), "xx");
    assert!(seen.starts_with("ed before anybody came\r\nx"), "the last 1024 bytes: {seen}");
    serial.driver.write_all(1, b"and more\r\n").unwrap();
    assert_eq!(read_until(&mut serial.connect("bare"), "more\r\n"), "and more\r\n");
}

#[test]
fn a_client_that_does_not_read_misses_bytes_and_is_told_how_many() {
    let mut serial = start(&["console,unix=@/tty"]);
    serial.driver.open(0, true).unwrap();
    let (mut lazy, mut keen) = (serial.connect("tty"), serial.connect("tty"));
    serial.driver.write_all(0, b"ready\n").unwrap();
    read_until(&mut keen, "ready\n");
    // More than a socket's buffer and what is kept.
    let line = [&[b'-'; CHUNK - 1][..], b"\n"].concat();
    for _ in 0..64 {
        serial.driver.write_all(0, &line).unwrap();
        read_exact(&mut keen, line.len());
    }
    serial.driver.write_all(0, b"the end").unwrap();
    let seen = read_until(&mut lazy, "the end");
    let mut parts = seen.split("\r\n[cleave-serial: ");
    let (mut got, mut notices) = (parts.next().unwrap().len(), 0);
    for part in parts {
        let (missed, rest) =
            part.split_once(" bytes are missing here, which were not read in time]\r\n").unwrap();
        got += missed.parse::<usize>().unwrap() + rest.len();
        notices += 1;
    }
    assert_eq!(got, 6 + 64 * line.len() + 7);
    assert!(notices > 0);
}

#[test]
fn a_guest_that_is_to_wait_waits_for_the_slowest_reader() {
    let mut serial = start(&["console,unix=@/tty,on-full=wait"]);
    serial.driver.open(0, true).unwrap();
    let mut client = serial.connect("tty");
    let content = content(4 << 20, 5);
    let mut sent = 0;
    for chunk in content.chunks(CHUNK) {
        while !serial.driver.write(0, chunk).unwrap() {
            let room = read_exact(&mut client, 1000);
            assert_eq!(room, content[sent..sent + 1000]);
            sent += 1000;
        }
    }
    assert_eq!(read_exact(&mut client, content.len() - sent), content[sent..]);
}

#[test]
fn the_size_is_that_of_the_terminal_that_a_client_showed_last() {
    let mut serial = start(&["console,unix=@/tty"]);
    serial.driver.open(0, true).unwrap();
    let client = serial.connect("tty");
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    for (columns, rows) in [(132, 43), (80, 25)] {
        let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&terminal, size).unwrap();
        (&client).write_all(b"ls").unwrap();
        send_terminal(client.as_fd(), terminal.as_fd()).unwrap();
        (&client).write_all(b"\n").unwrap();
        assert_eq!(serial.driver.read_exact(0, 3).unwrap(), b"ls\n", "and nothing of it is typed");
        serial.driver.hear_until(|driver| driver.port(0).size == Some([columns, rows])).unwrap();
        let config = serial.driver.frontend.config(0, 4).unwrap();
        assert_eq!(config, [columns.to_le_bytes(), rows.to_le_bytes()].concat());
    }
    // What is no terminal has no size.
    send_terminal(client.as_fd(), client.as_fd()).unwrap();
    (&client).write_all(b"x").unwrap();
    assert_eq!(serial.driver.read_exact(0, 1).unwrap(), b"x");
}

#[test]
fn the_other_order_of_a_size_is_there_for_the_kernels_that_have_it() {
    let mut serial = start_with(&["console,unix=@/tty"], &["--size-order=linux", "--control=@/control"]);
    ctl(&serial, &["resize", "columns=100", "rows=30"]);
    serial.driver.hear_until(|driver| driver.port(0).size == Some([30, 100])).unwrap();
}

#[test]
fn a_driver_that_knows_one_port_has_the_console() {
    let serial = start(&["console,unix=@/tty", "name=a,unix=@/a"]);
    let Serial { driver, ref daemon, .. } = serial;
    drop(driver);
    let frontend = Frontend::connect(&daemon.socket).unwrap();
    let mut driver = ConsoleDriver::start(frontend, !MULTIPORT, 64).unwrap();
    let mut client = connect(&serial.directory.path().join("tty"));
    driver.write_all(0, b"one port\n").unwrap();
    read_until(&mut client, "one port\n");
    client.write_all(b"typed").unwrap();
    assert_eq!(driver.read_exact(0, 5).unwrap(), b"typed");
}

#[test]
fn a_guest_that_can_do_nothing_else_prints_bytes_by_config_space() {
    let mut serial = start(&["console,unix=@/tty"]);
    let mut client = serial.connect("tty");
    for byte in b"panic!" {
        serial.driver.frontend.set_config(8, &u32::from(*byte).to_le_bytes()).unwrap();
    }
    read_until(&mut client, "panic!");
    assert!(serial.driver.frontend.set_config(0, &[1, 0]).is_err(), "the size is not the guest's");
}
