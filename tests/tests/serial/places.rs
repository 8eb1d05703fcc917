//! Where a port's other end can be.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use cleave_tests::driver::binary;
use rustix::process::Signal;

use super::*;

/// Bytes go both ways between port 1 and `other`.
fn both_ways(driver: &mut ConsoleDriver, mut write: impl Write, mut read: impl Read) {
    for round in 0..3 {
        let there = content(3000, round);
        write.write_all(&there).unwrap();
        assert_eq!(driver.read_exact(1, there.len()).unwrap(), there);
        let back = content(3000, 100 + round);
        driver.write_all(1, &back).unwrap();
        assert_eq!(read_exact(&mut read, back.len()), back);
    }
}

#[test]
fn a_pseudo_terminal_is_found_by_its_link_and_goes_with_the_daemon() {
    let mut serial = start(&["name=tty,pty,link=@/tty"]);
    serial.driver.open(1, true).unwrap();
    let link = serial.path("tty");
    let target = fs::read_link(&link).unwrap();
    assert!(serial.daemon.log().contains(&format!("a port is at {}", target.display())));
    let tty = fs::File::options().read(true).write(true).open(&link).unwrap();
    both_ways(&mut serial.driver, &tty, &tty);
    serial.daemon.signal(Signal::TERM).unwrap();
    assert!(serial.daemon.wait().unwrap().success(), "{}", serial.daemon.log());
    assert!(fs::symlink_metadata(&link).is_err(), "the link is gone");
}

#[test]
fn a_tcp_port_of_this_host_is_as_good_as_a_unix_socket() {
    // One that is free now.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut serial = start(&[&format!("name=tcp,tcp=127.0.0.1:{port}")]);
    serial.driver.open(1, true).unwrap();
    let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    both_ways(&mut serial.driver, &stream, &stream);
}

#[test]
fn fifos_are_made_and_used() {
    let mut serial = start(&["name=fifo,pipe=@/fifo"]);
    serial.driver.open(1, true).unwrap();
    let open = |name: &str| fs::File::options().read(true).write(true).open(serial.path(name)).unwrap();
    let (input, output) = (open("fifo.in"), open("fifo.out"));
    both_ways(&mut serial.driver, &input, &output);
}

#[test]
fn a_socket_that_somebody_else_listens_on_is_connected_to_again_and_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("listener");
    let mut serial = start(&[&format!("name=client,unix={},connect", path.display())]);
    serial.driver.open(1, true).unwrap();
    for _ in 0..3 {
        let listener = UnixListener::bind(&path).unwrap();
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        serial.driver.hear_until(|driver| driver.port(1).host_open).unwrap();
        both_ways(&mut serial.driver, &stream, &stream);
        drop((stream, listener));
        fs::remove_file(&path).unwrap();
        serial.driver.hear_until(|driver| !driver.port(1).host_open).unwrap();
    }
}

#[test]
fn standard_input_and_output_are_a_port_too() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let mut child = Command::new(binary("cleave-serial").unwrap())
        .arg("--socket-path")
        .arg(&socket)
        .args(["--port", "name=stdio,stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    let mut driver = loop {
        match ConsoleDriver::connect(&socket) {
            Ok(driver) => break driver,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
    };
    driver.come_up(1).unwrap();
    driver.open(1, true).unwrap();
    let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    both_ways(&mut driver, &stdin, BufReader::new(stdout));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn files_of_ports_are_removed_in_the_end_and_what_cannot_be_is_said_before() {
    let mut serial = start(&["name=data,unix=@/data", "name=log,file=@/log"]);
    assert!(serial.path("data").exists());
    serial.daemon.signal(Signal::USR1).unwrap();
    serial
        .daemon
        .wait_for_log("data: closed, 0 bytes from the guest, 0 to it; log: open on the host")
        .unwrap();
    serial.daemon.signal(Signal::TERM).unwrap();
    assert!(serial.daemon.wait().unwrap().success());
    assert!(!serial.path("data").exists() && serial.path("log").exists());
    for (port, wanted, code) in [
        ("name=a,unix=/nonexistent/x", "--port unix=/nonexistent/x: No such file", 2),
        ("name=a,file=/nonexistent/x", "--port file=/nonexistent/x: No such file", 3),
        ("name=a,fd=99", "--port fd=99: it is not open", 2),
        ("name=a", "it takes one of", 2),
        ("name=a,unixx=/x", "did you mean 'unix'", 2),
    ] {
        let program = binary("cleave-serial").unwrap();
        let output =
            Command::new(program).args(["--socket-path", "/nonexistent/s", "--port", port]).output().unwrap();
        let said = BufReader::new(&output.stderr[..]).lines().next().unwrap().unwrap();
        assert!(
            said.contains(wanted) && output.status.code() == Some(code),
            "{port}: {:?} {said}",
            output.status
        );
    }
}
