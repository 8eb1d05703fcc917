//! `query-qmp-schema`: every command, event and type there is, in QEMU's form (qapi/introspect.json), from the tables that
//! are also what is executed.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::answer::EVENTS;
use super::qmp::Entry;

/// Members of an object: a name, a type, and whether it may be missing.
type Members = &'static [(&'static str, &'static str, bool)];

/// The objects that are answered. A test compares them with what is.
pub(super) const OBJECTS: &[(&str, Members)] = &[
    ("empty", &[]),
    ("VersionTriple", &[("major", "int", false), ("minor", "int", false), ("micro", "int", false)]),
    ("VersionInfo", &[("qemu", "VersionTriple", false), ("package", "str", false)]),
    ("CommandInfo", &[("name", "str", false)]),
    ("KvmInfo", &[("enabled", "bool", false), ("present", "bool", false)]),
    ("StatusInfo", &[("running", "bool", false), ("status", "RunState", false)]),
    ("NameInfo", &[("name", "str", true)]),
    (
        "CpuInfoFast",
        &[
            ("cpu-index", "int", false),
            ("qom-path", "str", false),
            ("thread-id", "int", false),
            ("target", "str", false),
        ],
    ),
    (
        "CleaveDeviceInfo",
        &[
            ("name", "str", false),
            ("state", "CleaveDeviceState", false),
            ("since-ms", "int", false),
            ("restarts", "int", false),
            ("replayed", "int", false),
            ("last-error", "str", true),
            ("pid", "int", true),
            ("socket", "str", true),
        ],
    ),
    ("SchemaInfo", &[("name", "str", false), ("meta-type", "str", false)]),
];

const ENUMS: &[(&str, &[&str])] = &[
    ("RunState", &["running", "paused"]),
    ("CleaveDeviceState", &["starting", "connected", "lost", "reconnecting", "failed"]),
];

const BUILTINS: &[(&str, &str)] = &[("str", "string"), ("int", "int"), ("bool", "boolean")];

/// The schema of `commands`.
pub(super) fn of(commands: &[Entry]) -> Value {
    let mut types: Vec<Value> = BUILTINS
        .iter()
        .map(|(name, json)| json!({"name": name, "meta-type": "builtin", "json-type": json}))
        .collect();
    types.extend(OBJECTS.iter().map(|(name, members)| object(name, members)));
    types.extend(ENUMS.iter().map(|(name, values)| {
        let members: Vec<_> = values.iter().map(|value| json!({"name": value})).collect();
        json!({"name": name, "meta-type": "enum", "values": values, "members": members})
    }));
    let lists: BTreeSet<_> =
        commands.iter().filter_map(|entry| entry.returns.strip_suffix("-list")).collect();
    types.extend(lists.iter().map(
        |element| json!({"name": format!("{element}-list"), "meta-type": "array", "element-type": element}),
    ));
    for entry in commands {
        let arguments = arguments_of(entry.name, entry.arguments, &mut types);
        types.push(json!({"name": entry.name, "meta-type": "command", "arg-type": arguments, "ret-type": entry.returns, "allow-oob": false}));
    }
    for (name, data) in EVENTS {
        let arguments = arguments_of(name, data, &mut types);
        types.push(json!({"name": name, "meta-type": "event", "arg-type": arguments}));
    }
    Value::Array(types)
}

fn object(name: &str, members: Members) -> Value {
    let member = |(name, of, optional): &(&str, &str, bool)| match optional {
        true => json!({"name": name, "type": of, "default": null}),
        false => json!({"name": name, "type": of}),
    };
    json!({"name": name, "meta-type": "object", "members": members.iter().map(member).collect::<Vec<_>>()})
}

/// The object type of a command's arguments or an event's data, made if there are any.
fn arguments_of(name: &str, members: &[(&'static str, &'static str)], types: &mut Vec<Value>) -> String {
    if members.is_empty() {
        return "empty".to_owned();
    }
    let type_name = format!("q_obj_{name}-arg");
    let members: Vec<_> = members.iter().map(|(name, of)| json!({"name": name, "type": of})).collect();
    types.push(json!({"name": type_name, "meta-type": "object", "members": members}));
    type_name
}
