//! net-bench: what it measures, refuses. It needs DPDK's testpmd from Debian's packages.

use std::path::Path;
use std::process::{Command, Output};

use cleave_tests::driver::Daemon;
use cleave_tests::network;
use serde_json::Value;

const SHORT: [&str; 4] = ["--runtime", "0.2", "--rounds", "1"];

fn bench(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_net-bench")).args(words).args(SHORT).output().unwrap()
}

fn json(words: &[&str]) -> Value {
    let output = bench(&[words, &["--json"]].concat());
    let errors = String::from_utf8_lossy(&output.stderr);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{words:?}: {}\n{text}\n{errors}", output.status);
    serde_json::from_slice(&output.stdout).unwrap()
}

fn refused(words: &[&str], code: i32, saying: &str) {
    let output = bench(words);
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert_eq!(output.status.code(), Some(code), "{words:?}: {said}");
    assert!(said.contains(saying), "{said}");
}

/// Who was measured in a row, all of whom have figures.
fn measured(row: &Value) -> Vec<&str> {
    let peers = row["peers"].as_array().unwrap();
    for peer in peers {
        assert!(peer["frames_per_s"].as_f64().unwrap() > 0.0, "{peer}");
        assert!(peer["gbit_per_s"].as_f64().unwrap() > 0.0, "{peer}");
        // Of so short a time the kernel may count none.
        assert!(peer["cores"].as_f64().is_some(), "{peer}");
    }
    peers.iter().map(|peer| peer["peer"].as_str().unwrap()).collect()
}

#[test]
fn a_tap_device_both_ways_beside_a_plain_program() {
    if std::thread::spawn(network::enter).join().unwrap().is_none() {
        return;
    }
    let document = json(&["--peers", "plain,cleave"]);
    let rows = document["rows"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["row"].as_str().unwrap()).collect();
    assert_eq!(names, ["send 64", "send 1500", "send 64k", "receive 64", "receive 1500", "receive 64k"]);
    for row in rows {
        assert_eq!(measured(row), ["plain", "cleave"]);
    }
    let document = json(&["--peers", "cleave,cleave-poll", "--size", "1500", "--queues", "2"]);
    assert_eq!(measured(&document["rows"][0]), ["cleave", "cleave-poll"]);
}

#[test]
fn from_guest_to_guest_through_testpmd() {
    let document = json(&["--way", "forward", "--peers", "testpmd", "--size", "64,1500"]);
    for row in document["rows"].as_array().unwrap() {
        assert_eq!(measured(row), ["testpmd"]);
    }
}

#[test]
fn any_socket_is_measured_and_left_as_it_was() {
    if network::enter().is_none() {
        return;
    }
    let daemon = Daemon::start("cleave-net", &["--tap", "tap0"]).unwrap();
    let socket = daemon.socket.to_str().unwrap();
    for _ in 0..2 {
        let document = json(&["--socket", socket, "--size", "1500"]);
        assert_eq!(measured(&document["rows"][0]), ["socket"]);
    }
}

#[test]
fn errors_say_what_is_wrong() {
    refused(&["--size", "59"], 2, "60 to 1514 bytes are needed, or 64k");
    refused(&["--way", "forward", "--peers", "plain"], 2, "nobody is left to measure 'forward 64'");
    let dead = Path::new("/nowhere/dead.sock").to_str().unwrap();
    refused(&["--socket", dead, "--size", "64"], 1, "does a vhost-user daemon listen there?");
    // A network that nobody sends into.
    if network::enter().is_some() {
        let daemon = Daemon::start("cleave-net", &["--tap", "tap0"]).unwrap();
        let words = ["--socket", daemon.socket.to_str().unwrap(), "--way", "receive", "--size", "64"];
        refused(&words, 1, "no frame has passed in 10 s");
    }
}
