//! The control socket: ports that come and go, what they are doing, logs.

use std::io::{Read, Write};

use serde_json::{Value, json};

use super::*;

fn answer(serial: &Serial, words: &[&str]) -> Value {
    serde_json::from_str(&ctl(serial, words)).unwrap()
}

#[test]
fn ports_are_added_and_removed_while_the_guest_has_others_open() {
    let mut serial = start_with(&["name=first,unix=@/first"], &["--control=@/control", "--max-ports=3"]);
    let place = serial.path("added");
    let added = answer(&serial, &["port-add", &format!("port=name=second,unix={}", place.display())]);
    assert_eq!(added, json!({"id": 2}));
    serial.driver.hear_until(|driver| driver.port(2).name.as_deref() == Some("second")).unwrap();
    serial.driver.open(2, true).unwrap();
    let mut client = connect(&place);
    client.write_all(b"to the new port").unwrap();
    assert_eq!(serial.driver.read_exact(2, 15).unwrap(), b"to the new port");
    serial.driver.write_all(2, b"and back").unwrap();
    read_until(&mut client, "and back");
    let ports = answer(&serial, &["query-ports"]);
    assert_eq!((ports[1]["name"].clone(), ports[1]["clients"].clone()), (json!("second"), json!(1)));
    assert_eq!((ports[1]["from-guest"].clone(), ports[1]["to-guest"].clone()), (json!(8), json!(15)));
    for (words, wanted) in [
        (&["port-add", "port=name=second,log=1K"][..], "of the name 'second'"),
        (&["port-add", "port=name=third,stdio"], "stdio and fd= are for"),
        (&["port-add", "port=third"], "'third' is not one of: console"),
        (&["port-remove", "port=third"], "there is no port"),
        (&["log-read", "port=first"], "keeps no log"),
        (&["resize", "columns=1"], "missing field"),
    ] {
        let said = ctl_refused(&serial, words);
        assert!(said.contains(wanted), "{words:?}: {said}");
    }
    ctl(&serial, &["port-remove", "port=second"]);
    serial.driver.hear_until(|driver| !driver.ports.contains_key(&2)).unwrap();
    read_end(&mut client);
    // Its number is free again.
    let added = answer(&serial, &["port-add", "port=name=third,pty"]);
    assert_eq!(added, json!({"id": 2}));
    serial.driver.hear_until(|driver| driver.port(2).name.as_deref() == Some("third")).unwrap();
}

#[test]
fn a_log_keeps_the_newest_and_says_how_much_there_was() {
    let mut serial = start_with(&["name=log,log=1K"], &["--control=@/control"]);
    serial.driver.hear_until(|driver| driver.port(1).host_open).unwrap();
    for line in 0..100 {
        serial.driver.write_all(1, format!("line {line:>3} of the log\n").as_bytes()).unwrap();
    }
    let log = answer(&serial, &["log-read", "port=log"]);
    let (dropped, text) = (log["dropped"].as_u64().unwrap(), log["text"].as_str().unwrap());
    assert_eq!((dropped, text.len()), (100 * 20 - 1024, 1024));
    assert!(text.ends_with("line  98 of the log\nline  99 of the log\n"), "{text}");
}

fn read_end(stream: &mut impl Read) {
    let mut rest = Vec::new();
    // It may be reset.
    let _ = stream.read_to_end(&mut rest);
}
