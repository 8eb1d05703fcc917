//! cleave-serial is killed (SIGKILL) in the middle of it all, and every byte arrives once.

use std::io::{ErrorKind, Read, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::*;

const SIZE: usize = 100 << 20;
const KILLS: usize = 40;

/// Reads from whoever serves the port, one after the other, until everything has come.
fn receive_all(path: &Path, count: &AtomicUsize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(SIZE);
    while bytes.len() < SIZE {
        let mut stream = connect_patiently(path);
        let mut chunk = vec![0; 1 << 20];
        loop {
            match stream.read(&mut chunk) {
                // The daemon is dead: what it had sent has been read.
                Ok(0) => break,
                Ok(len) => bytes.extend_from_slice(&chunk[..len]),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
                Err(error) => panic!("{error} after {} bytes", bytes.len()),
            }
            count.store(bytes.len(), Ordering::Relaxed);
            if bytes.len() >= SIZE {
                break;
            }
        }
    }
    bytes
}

#[test]
fn a_hundred_megabytes_arrive_bit_for_bit_while_the_daemon_is_killed() {
    let mut serial = start(&["name=data,unix=@/data"]);
    let region = serial.driver.track_inflight().unwrap();
    serial.driver.open(1, true).unwrap();
    let content = content(SIZE, 1);
    let (path, count) = (serial.path("data"), AtomicUsize::new(0));
    let Serial { daemon, driver, .. } = &mut serial;
    let received = thread::scope(|scope| {
        let client = scope.spawn(|| receive_all(&path, &count));
        let mut chunks = content.chunks(32 << 10).enumerate();
        let mut next = chunks.next();
        let mut kills = 0;
        while let Some((_, chunk)) = next {
            if driver.write(1, chunk).unwrap() {
                next = chunks.next();
            } else {
                let _ = driver.queues[5].wait(&driver.ram, Duration::from_millis(20));
            }
            // Wherever it is then: in the middle of a call mostly.
            if kills < KILLS && count.load(Ordering::Relaxed) > (kills + 1) * (SIZE / (KILLS + 2)) {
                daemon.kill_and_restart().unwrap();
                driver.resume(&daemon.socket, Some(&region)).unwrap();
                kills += 1;
            }
        }
        while driver.reap(1).unwrap() != 0 {
            driver.wait_written(1).unwrap();
        }
        assert!(kills > KILLS / 2, "{kills} kills");
        client.join().unwrap()
    });
    assert_same(&received, &content);
}

fn assert_same(received: &[u8], sent: &[u8]) {
    let differs = received.iter().zip(sent).position(|(a, b)| a != b);
    assert_eq!((received.len(), differs), (sent.len(), None), "bytes, and the first that is another one");
}

#[test]
fn a_file_gets_every_byte_once() {
    const SIZE: usize = 8 << 20;
    let mut serial = start(&["name=data,file=@/data"]);
    let region = serial.driver.track_inflight().unwrap();
    let content = content(SIZE, 2);
    let path = serial.path("data");
    let Serial { daemon, driver, .. } = &mut serial;
    let mut kills = 0;
    for (at, chunk) in content.chunks(10_000).enumerate() {
        while !driver.write(1, chunk).unwrap() {
            driver.wait_written(1).unwrap();
        }
        if at % 40 == 39 {
            daemon.kill_and_restart().unwrap();
            driver.resume(&daemon.socket, Some(&region)).unwrap();
            kills += 1;
        }
    }
    while driver.reap(1).unwrap() != 0 {
        driver.wait_written(1).unwrap();
    }
    assert!(kills >= 20);
    assert_same(&std::fs::read(path).unwrap(), &content);
}

/// What a client sent and the daemon had not read dies with it, and the client sees that; what the daemon has read reaches
/// the guest, once.
#[test]
fn what_a_client_sent_reaches_the_guest_once() {
    let mut serial = start(&["name=data,unix=@/data"]);
    let region = serial.driver.track_inflight().unwrap();
    serial.driver.open(1, true).unwrap();
    for round in 0..30_u64 {
        let mut client = connect_patiently(&serial.path("data"));
        let sent = content(50_000, round);
        client.write_all(&sent).unwrap();
        let before = serial.driver.read_exact(1, 1 + round as usize * 1500 % 20_000).unwrap();
        serial.daemon.kill_and_restart().unwrap();
        let socket = serial.daemon.socket.clone();
        serial.driver.resume(&socket, Some(&region)).unwrap();
        drop(client);
        let mut all = before;
        let mark = [0xee; 16];
        connect_patiently(&serial.path("data")).write_all(&mark).unwrap();
        while !all.ends_with(&mark) {
            all.extend(serial.driver.read_exact(1, 1).unwrap());
        }
        let got = &all[..all.len() - mark.len()];
        assert_eq!(got, &sent[..got.len()], "in order, without a gap and without a repetition");
    }
}

#[test]
fn the_guest_sees_no_closed_port_when_the_client_comes_again() {
    let mut serial = start(&["name=data,unix=@/data", "console,unix=@/console"]);
    let region = serial.driver.track_inflight().unwrap();
    serial.driver.open(1, true).unwrap();
    let _client = serial.connect("data");
    serial.driver.hear_until(|driver| driver.port(1).host_open).unwrap();
    for _ in 0..3 {
        serial.daemon.kill_and_restart().unwrap();
        let socket = serial.daemon.socket.clone();
        serial.driver.resume(&socket, Some(&region)).unwrap();
        let mut client = connect_patiently(&serial.path("data"));
        client.write_all(b"still open in the guest").unwrap();
        assert_eq!(serial.driver.read_exact(1, 23).unwrap(), b"still open in the guest");
        serial.driver.hear().unwrap();
        assert_eq!((serial.driver.port(1).host_open, serial.driver.port(1).closed), (true, 0));
        // The client of the last daemon is gone with it; this one stays until the next kill.
        std::mem::forget(client);
    }
    // The driver is asked nothing again, and may go on as it was.
    serial.driver.write_all(0, b"and the console\r\n").unwrap();
    read_until(&mut serial.connect("console"), "and the console\r\n");
}
