//! A machine steered from outside: QMP with the client that everybody has, and with a line from a shell.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use cleave_tests::cache::Cache;
use cleave_tests::peers;
use cleave_tests::vm::{Outcome, Vm};
use serde_json::Value;

use crate::rig::{BOOT, Rig, SOON, nothing_left_behind};

pub const CASES: &[crate::Case] = &[
    ("control::a_machines_life_over_qmp_by_the_python_client", life),
    ("control::a_guest_that_is_stopped_stands_still_and_misses_nothing", stopped),
    ("control::clients_that_misbehave_do_no_harm", misbehaving),
];

/// The tiny guest's shell with a disk and a QMP socket.
fn machine(rig: &Rig) -> Outcome<(Vm, std::path::PathBuf)> {
    let (disk, qmp) = (rig.blank("disk", 4 << 20)?, rig.path("qmp"));
    let address = format!("unix:{},server=on,wait=off", qmp.display());
    let words = ["--cpus", "2", "--name", "trial", "--qmp", &address];
    let vm = rig.shell().disk(&disk, "").with(words).start()?;
    vm.expect("SHELL", BOOT)?;
    Ok((vm, qmp))
}

fn life(rig: &Rig) -> Outcome<()> {
    let (vm, qmp) = machine(rig)?;
    let client =
        Cache::open().and_then(|cache| peers::qmp_client(&cache)).map_err(|error| error.to_string())?;
    let script = rig.write("control.py", include_bytes!("control.py"))?;
    let output = Command::new("/usr/bin/python3")
        .env("PYTHONPATH", client)
        .args([&script, &qmp])
        .output()
        .map_err(|error| format!("python3: {error}"))?;
    let (said, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !output.status.success() || !said.contains("passed") {
        return Err(format!("{}: {said}{error}", output.status));
    }
    eprintln!("{}", said.trim());
    vm.wait(SOON)?.demand(0)?;
    if qmp.exists() {
        return Err("the socket is left behind".to_owned());
    }
    nothing_left_behind()
}

/// A QMP client of few words.
struct Line(BufReader<UnixStream>);

impl Line {
    fn open(socket: &Path) -> Outcome<Self> {
        let stream = UnixStream::connect(socket).map_err(|error| format!("connect: {error}"))?;
        stream.set_read_timeout(Some(SOON)).map_err(|error| error.to_string())?;
        let mut line = Self(BufReader::new(stream));
        line.read()?;
        Ok(line)
    }

    fn read(&mut self) -> Outcome<Value> {
        let mut text = String::new();
        self.0.read_line(&mut text).map_err(|error| format!("no answer: {error}"))?;
        serde_json::from_str(&text).map_err(|error| format!("{text:?} is no JSON: {error}"))
    }

    fn ask(&mut self, command: &str) -> Outcome<Value> {
        writeln!(self.0.get_mut(), "{{\"execute\": \"{command}\"}}").map_err(|error| error.to_string())?;
        let answer = self.read()?;
        answer.get("return").cloned().ok_or_else(|| format!("{command}: {answer}"))
    }
}

fn stopped(rig: &Rig) -> Outcome<()> {
    let (mut vm, qmp) = machine(rig)?;
    vm.send(
        "n=0; while :; do n=$((n + 1)); echo $n >/dev/vda; cat /proc/uptime; sleep 0.2; done & echo GOES",
    )?;
    vm.expect("GOES", SOON)?;
    let uptime = |text: &str| -> Option<f64> { text.split_whitespace().next()?.parse().ok() };
    let mut line = Line::open(&qmp)?;
    line.ask("stop")?;
    // What it had said before it stopped is read now.
    while vm.expect("\n", Duration::from_secs(1)).is_ok() {}
    if vm.expect("\n", Duration::from_secs(3)).is_ok() {
        return Err("a guest that is stopped goes on".to_owned());
    }
    line.ask("cont")?;
    vm.expect("\n", SOON)?;
    let after = vm.expect("\n", SOON)?;
    if uptime(&after).is_none() {
        eprintln!("the guest says {after:?}");
    }
    vm.send("kill $!; echo STILL $((6 * 7))")?;
    vm.expect("STILL 42", SOON)?;
    line.ask("quit")?;
    vm.wait(SOON)?.demand(0)?;
    nothing_left_behind()
}

fn misbehaving(rig: &Rig) -> Outcome<()> {
    let (mut vm, qmp) = machine(rig)?;
    // More than there is room for, none of which says a word.
    let idle: Vec<_> = (0..100).filter_map(|_| UnixStream::connect(&qmp).ok()).collect();
    drop(idle);
    for bytes in [&b"\xff\xfe\n"[..], b"{\"execute\": 7}\n", &[b'['; 1 << 20], b"{\"execute\": \"stop\""] {
        let mut stream = UnixStream::connect(&qmp).map_err(|error| format!("connect: {error}"))?;
        // It may be hung up on in the middle.
        let _ = stream.write_all(bytes);
    }
    let mut deaf = UnixStream::connect(&qmp).map_err(|error| format!("connect: {error}"))?;
    deaf.set_write_timeout(Some(SOON)).map_err(|error| error.to_string())?;
    while deaf.write_all(b"{\"execute\": \"query-qmp-schema\"}\n").is_ok() {}
    let status = Line::open(&qmp)?.ask("query-status")?;
    if status["running"] != Value::Bool(true) {
        return Err(format!("it was stopped by half a line: {status}"));
    }
    vm.send("echo STILL $((6 * 7))")?;
    vm.expect("STILL 42", SOON)?;
    Line::open(&qmp)?.ask("quit")?;
    vm.wait(SOON)?.demand(0)?;
    nothing_left_behind()
}
