//! The program: its command line, what it costs, how it ends.

use std::fs;
use std::process::Command;

use cleave_tests::driver::binary;
use rustix::process::Signal;

use super::*;

fn ctl(balloon: &Balloon, words: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(binary("cleave-balloon").unwrap())
        .arg("ctl")
        .arg(&balloon.control)
        .args(words)
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}

#[test]
fn a_person_steers_it_by_ctl() {
    let (balloon, mut driver) = Balloon::with_driver(&[]);
    let (code, said) = ctl(&balloon, &["target", "size=100M"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("\"size\": 104857600"), "{said}");
    assert_eq!(driver.config().unwrap().num_pages, 28 << 8);
    assert_eq!(ctl(&balloon, &["target", "size=all"]).0, Some(0));
    assert_eq!(ctl(&balloon, &["inhibit", "state=on"]).0, Some(0));
    assert_eq!(ctl(&balloon, &["inhibit", "state=false"]).0, Some(0));
    let (code, said) = ctl(&balloon, &["traget", "size=1M"]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("did you mean 'target'?"), "{said}");
    let (code, said) = ctl(&balloon, &["stats"]);
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("the guest has not answered yet"), "{said}");
}

#[test]
fn mistakes_are_one_line_and_exit_code_2() {
    for (words, reason) in [
        (&["--auto", "fre=1G"][..], "did you mean 'free'?"),
        (&["--auto", "min=1G"], "'free=' is missing"),
        (&["--stats-interval", "0.01"], "a number of seconds is needed, from 0.1 on, or 0"),
        (&["--target", "lots"], "'lots' is no size"),
        (&["--state", "/nonexistent/state"], "--state /nonexistent/state"),
        (&["--state-fd", "77"], "--state-fd 77: it is not open"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let output = Command::new(binary("cleave-balloon").unwrap())
            .arg("--socket-path")
            .arg(directory.path().join("socket"))
            .args(words)
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{words:?}: {said}");
        assert!(said.contains(reason) && said.lines().count() == 1, "{words:?}: {said}");
    }
    let output =
        Command::new(binary("cleave-balloon").unwrap()).arg("--print-capabilities").output().unwrap();
    assert_eq!(output.stdout, b"{\"type\": \"balloon\", \"features\": []}\n");
}

/// How often its threads have been switched to, in all.
fn switches(daemon: &Daemon) -> u64 {
    let threads = daemon.process().threads().unwrap();
    let of = |thread: &rustix::process::Pid| {
        let status = fs::read_to_string(format!("/proc/{}/task/{thread}/status", daemon.pid())).unwrap();
        let counts = status.lines().filter_map(|line| line.split_once("ctxt_switches:"));
        counts.map(|(_, count)| count.trim().parse::<u64>().unwrap()).sum::<u64>()
    };
    threads.iter().map(of).sum()
}

#[test]
fn it_is_not_woken_when_nothing_changes_and_is_small() {
    let (balloon, mut driver) = Balloon::with_driver(&[]);
    let pfns: Vec<u32> = (FIRST..FIRST + 4096).collect();
    fill(&driver, &pfns);
    driver.inflate(&pfns).unwrap();
    driver.tell_statistics(&[(4, 5 * MIB)]).unwrap();
    wait_until("statistics", || balloon.ask("stats", serde_json::json!({})).is_ok());
    // What was asked of it is done once these do not change any more.
    let mut before = switches(&balloon.daemon);
    wait_until("rest", || {
        std::thread::sleep(Duration::from_millis(200));
        std::mem::replace(&mut before, switches(&balloon.daemon)) == before
    });
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(switches(&balloon.daemon), before, "its threads sleep");
    let memory = balloon.daemon.process().memory().unwrap();
    eprintln!("{} KiB beside guest memory", memory >> 10);
}

#[test]
fn it_ends_in_order_and_takes_its_sockets_with_it() {
    let (mut balloon, _driver) = Balloon::with_driver(&[]);
    balloon.daemon.signal(Signal::USR1).unwrap();
    balloon.daemon.wait_for_log("the balloon has 0 MiB and is to have 0 MiB").unwrap();
    balloon.daemon.signal(Signal::TERM).unwrap();
    assert!(balloon.daemon.wait().unwrap().success());
    assert!(!balloon.daemon.socket.exists() && !balloon.control.exists());
}
