//! Who does not read stops his own port, and nothing is lost; and 31 ports at once.

use std::io::Write;

use cleave_tests::driver::console::CHUNK;

use super::*;

#[test]
fn a_client_that_does_not_read_stops_its_port_and_no_other() {
    let mut serial = start(&["name=slow,unix=@/slow", "name=quick,unix=@/quick"]);
    let (mut slow, mut quick) = (serial.connect("slow"), serial.connect("quick"));
    let content = content(8 << 20, 3);
    let mut chunks = content.chunks(CHUNK);
    let mut waiting = None;
    for chunk in chunks.by_ref() {
        // Until its socket, and all places of the queue, are full.
        if !serial.driver.write(1, chunk).unwrap() {
            serial.driver.write_all(2, b"between\n").unwrap();
            read_until(&mut quick, "between\n");
            if !serial.driver.write(1, chunk).unwrap() {
                waiting = Some(chunk);
                break;
            }
        }
    }
    let waiting = waiting.expect("8 MiB are more than a socket takes");
    for round in 0..50_u64 {
        let sent = super::content(100_000, round);
        let Serial { driver, .. } = &mut serial;
        let received = std::thread::scope(|scope| {
            let reader = scope.spawn(|| read_exact(&mut quick, sent.len()));
            driver.write_all(2, &sent).unwrap();
            reader.join().unwrap()
        });
        assert_eq!(received, sent);
    }
    // Now it reads.
    let rest: Vec<&[u8]> = std::iter::once(waiting).chain(chunks).collect();
    let Serial { driver, .. } = &mut serial;
    let received = std::thread::scope(|scope| {
        let reader = scope.spawn(|| read_exact(&mut slow, content.len()));
        for chunk in rest {
            while !driver.write(1, chunk).unwrap() {
                driver.wait_written(1).unwrap();
            }
        }
        reader.join().unwrap()
    });
    assert!(received == content);
}

#[test]
fn a_guest_that_does_not_read_stops_its_client_and_loses_nothing() {
    let mut serial = start(&["name=data,unix=@/data"]);
    let mut client = serial.connect("data");
    client.set_nonblocking(true).unwrap();
    let content = content(4 << 20, 4);
    let mut sent = 0;
    // Nobody has the port open in the guest.
    while let Ok(count) = client.write(&content[sent..]) {
        sent += count;
    }
    assert!(sent < content.len(), "a socket takes so much and no more");
    assert!(serial.driver.read(1).unwrap().is_none());
    serial.driver.open(1, true).unwrap();
    client.set_nonblocking(false).unwrap();
    let Serial { driver, .. } = &mut serial;
    let received = std::thread::scope(|scope| {
        scope.spawn(|| client.write_all(&content[sent..]).unwrap());
        driver.read_exact(1, content.len()).unwrap()
    });
    assert!(received == content);
}

#[test]
fn what_a_client_left_unread_waits_for_the_next_one() {
    let mut serial = start(&["name=data,unix=@/data"]);
    serial.driver.write(1, b"before anybody came\n").unwrap();
    let mut first = serial.connect("data");
    read_until(&mut first, "came\n");
    serial.driver.hear_until(|driver| driver.port(1).host_open).unwrap();
    drop(first);
    serial.driver.hear_until(|driver| !driver.port(1).host_open).unwrap();
    serial.driver.write(1, b"while nobody was there\n").unwrap();
    let mut second = serial.connect("data");
    assert_eq!(read_until(&mut second, "there\n"), "while nobody was there\n");
    // One at a time: the third is served when the second is gone.
    let mut third = serial.connect("data");
    serial.driver.write_all(1, b"to the second\n").unwrap();
    read_until(&mut second, "second\n");
    drop(second);
    serial.driver.open(1, true).unwrap();
    third.write_all(b"hello").unwrap();
    assert_eq!(serial.driver.read_exact(1, 5).unwrap(), b"hello");
}

#[test]
fn thirty_one_ports_are_open_at_once_with_one_thread_and_little_memory() {
    let ports: Vec<String> = (0..30).map(|port| format!("name=port{port},unix=@/{port}")).collect();
    let all: Vec<&str> =
        std::iter::once("console,unix=@/tty").chain(ports.iter().map(String::as_str)).collect();
    let mut serial = start(&all);
    let mut clients: Vec<_> = (0..30).map(|port| serial.connect(&port.to_string())).collect();
    clients.insert(0, serial.connect("tty"));
    for port in 0..31 {
        serial.driver.open(port, true).unwrap();
    }
    serial.driver.hear_until(|driver| (0..31).all(|port| driver.port(port).host_open)).unwrap();
    for round in 0..3_u64 {
        for (port, client) in (0u32..).zip(&mut clients) {
            client.write_all(&content(2000, round * 100 + u64::from(port))).unwrap();
        }
        for (port, client) in (0u32..).zip(&mut clients) {
            let wanted = content(2000, round * 100 + u64::from(port));
            assert_eq!(serial.driver.read_exact(port, 2000).unwrap(), wanted);
            serial.driver.write_all(port, &wanted).unwrap();
            assert_eq!(read_exact(client, 2000), wanted);
        }
    }
    let process = serial.daemon.process();
    let threads = process.threads().unwrap().len();
    let memory = process.memory().unwrap();
    eprintln!("31 ports: {threads} threads, {} KiB", memory >> 10);
    assert_eq!(threads, 2, "the session's and the ports'");
    assert!(memory < 8 << 20, "{memory} bytes");
}
