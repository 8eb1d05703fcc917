use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use cleave_common::control::{Client, Line, Request};
use serde_json::{Map, Value, json};

use super::answer::EVENTS;
use super::*;

/// A machine that says what it was told, and is what a schema has to describe.
fn obey(told: &Mutex<Vec<Command>>, asked: Asked) {
    let command = asked.command.clone();
    told.lock().unwrap().push(command.clone());
    asked.answer(match command {
        Command::QueryStatus => Ok(Answer::Status(RunState::Running)),
        Command::QueryName => Ok(Answer::Name(Some("vm".to_owned()))),
        Command::QueryCpus => Ok(Answer::Cpus(vec![Cpu {
            cpu_index: 0,
            qom_path: "/machine/vcpu0".to_owned(),
            thread_id: 7,
            target: "x86_64",
        }])),
        Command::QueryDevices => Ok(Answer::Devices(vec![DeviceInfo {
            name: "disk0".to_owned(),
            state: "lost",
            since_ms: 5,
            restarts: 1,
            replayed: 2,
            last_error: Some("killed by signal 9".to_owned()),
            pid: Some(3),
            socket: Some("/run/disk".to_owned()),
        }])),
        Command::RestartDevice { name } => {
            Err(ControlError::not_found(format!("there is no device '{name}'")))
        }
        _ => Ok(Answer::Done),
    });
}

struct Rig {
    _directory: tempfile::TempDir,
    path: std::path::PathBuf,
    told: Arc<Mutex<Vec<Command>>>,
    control: Control,
}

fn rig() -> Rig {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qmp");
    let told = Arc::new(Mutex::new(Vec::new()));
    let machine = Arc::clone(&told);
    let sockets = vec![ControlSocket::unix(&path).unwrap()];
    let control = Control::start(sockets, || {}, move |asked| obey(&machine, asked)).unwrap();
    Rig { _directory: directory, path, told, control }
}

fn call(client: &mut Client, command: &str, arguments: Value) -> Result<Value, String> {
    let arguments: Map<String, Value> = arguments.as_object().unwrap().clone();
    client.call(command, &arguments, &[]).map_err(|error| error.to_string())
}

#[test]
fn commands_reach_the_machine_and_answers_the_client() {
    let rig = rig();
    let mut client = Client::connect(&rig.path).unwrap();
    let mut ask = |command: &str| call(&mut client, command, json!({})).unwrap();
    assert_eq!(ask("qmp_capabilities"), json!({}));
    assert_eq!(ask("query-status"), json!({"status": "running", "running": true}));
    assert_eq!(ask("query-kvm")["enabled"], json!(true));
    for command in ["stop", "cont", "system_powerdown", "system_reset", "quit"] {
        assert_eq!(ask(command), json!({}));
    }
    let told = rig.told.lock().unwrap()[1..].to_vec();
    use Command as C;
    assert_eq!(told, [C::Stop, C::Continue, C::PowerDown, C::Reset, C::Quit]);
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let rig = rig();
    let mut client = Client::connect(&rig.path).unwrap();
    for (command, arguments, wanted) in [
        (
            "system_powerdwn",
            json!({}),
            "unknown command 'system_powerdwn' (did you mean 'system_powerdown'?)",
        ),
        ("stop", json!({"now": true}), "stop has no arguments, and 'now' is given"),
        ("x-cleave-restart-device", json!({}), "x-cleave-restart-device: missing field `device`"),
        (
            "x-cleave-restart-device",
            json!({"device": 7}),
            "x-cleave-restart-device: invalid type: integer `7`",
        ),
        ("x-cleave-restart-device", json!({"device": "disk7"}), "there is no device 'disk7'"),
        ("qmp_capabilities", json!({"enable": ["oob"]}), "qmp_capabilities: 'oob' is not offered"),
    ] {
        let error = call(&mut client, command, arguments).unwrap_err();
        assert!(error.starts_with(wanted), "{command}: {error}");
    }
}

#[test]
fn events_reach_those_that_have_negotiated() {
    let rig = rig();
    let mut stream = UnixStream::connect(&rig.path).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let mut next = || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    assert_eq!(next()["QMP"]["version"]["package"], json!(concat!("cleave ", env!("CARGO_PKG_VERSION"))));
    rig.control.notify(Notice::Resume);
    // More than are answered in a turn: after that the thread has heard of it.
    for id in 0..40 {
        writeln!(stream, "{{\"execute\": \"query-name\", \"id\": {id}}}").unwrap();
        assert_eq!(next(), json!({"return": {"name": "vm"}, "id": id}));
    }
    stream.write_all(b"{\"execute\": \"qmp_capabilities\"}\n").unwrap();
    assert_eq!(next(), json!({"return": {}}));
    rig.control.notify(Notice::Shutdown { guest: true, reason: "guest-shutdown" });
    drop(rig.control);
    let event = next();
    assert_eq!(event["event"], json!("SHUTDOWN"));
    assert_eq!(event["data"], json!({"guest": true, "reason": "guest-shutdown"}));
    assert!(event["timestamp"]["seconds"].as_u64().unwrap() > 1_700_000_000);
    assert!(!rig.path.exists());
}

/// The names of an object's members, and whether each may be missing.
fn members(schema: &BTreeMap<String, Value>, name: &str) -> BTreeMap<String, bool> {
    let object = &schema[name];
    assert_eq!(object["meta-type"], json!("object"), "{name}");
    let member = |member: &Value| {
        assert!(schema.contains_key(member["type"].as_str().unwrap()), "{member}");
        (member["name"].as_str().unwrap().to_owned(), member.get("default").is_some())
    };
    object["members"].as_array().unwrap().iter().map(member).collect()
}

#[test]
fn the_schema_is_true() {
    let rig = rig();
    let mut client = Client::connect(&rig.path).unwrap();
    let schema = call(&mut client, "query-qmp-schema", json!({})).unwrap();
    let schema: BTreeMap<String, Value> = schema
        .as_array()
        .unwrap()
        .iter()
        .map(|info| (info["name"].as_str().unwrap().to_owned(), info.clone()))
        .collect();
    for entry in qmp::COMMANDS.iter().filter(|entry| entry.name.contains("query")) {
        let answer = call(&mut client, entry.name, json!({})).unwrap();
        let (element, type_name) = match schema[entry.returns]["element-type"].as_str() {
            Some(element) => (answer[0].clone(), element),
            None => (answer, entry.returns),
        };
        let members = members(&schema, type_name);
        let keys: BTreeSet<_> = element.as_object().unwrap().keys().cloned().collect();
        // Of the schema's own entries more is said than they have in common.
        if type_name != "SchemaInfo" {
            assert!(keys.iter().all(|key| members.contains_key(key)), "{}: {keys:?}", entry.name);
        }
        for (name, _) in members.iter().filter(|(_, optional)| !**optional) {
            assert!(keys.contains(name), "{}: {name}", entry.name);
        }
    }
    let notices = [
        Notice::Stop,
        Notice::Resume,
        Notice::PowerDown,
        Notice::Reset { guest: true, reason: "guest-reset" },
        Notice::Shutdown { guest: true, reason: "guest-shutdown" },
        Notice::DeviceLost { device: "disk0".to_owned(), reason: "gone".to_owned() },
        Notice::DeviceRecovered { device: "disk0".to_owned(), downtime_ms: 1, replayed: 2 },
    ];
    assert_eq!(notices.len(), EVENTS.len());
    for notice in notices {
        let data = notice.data().unwrap_or_else(|| json!({}));
        let keys: BTreeSet<_> = data.as_object().unwrap().keys().cloned().collect();
        let described = members(&schema, schema[notice.name()]["arg-type"].as_str().unwrap());
        assert_eq!(keys, described.into_keys().collect(), "{}", notice.name());
    }
}

#[test]
fn a_machine_that_ends_answers_so() {
    let outcome = ask(Command::Stop, &|asked| drop(asked));
    assert_eq!(outcome.unwrap_err().desc, "the machine is ending");
    let line = Line { bytes: b"{\"execute\": \"stop\"}".to_vec(), fds: Vec::new() };
    assert!(matches!(qmp::read(&Request::read(line).unwrap()), Ok(qmp::Asks::Machine(Command::Stop))));
}
