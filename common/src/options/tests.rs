use std::path::PathBuf;

use proptest::prelude::*;
use serde::Deserialize;

use super::*;
use crate::size::ByteSize;
use crate::virtio::DeviceType;

#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Disk {
    path: PathBuf,
    #[serde(default)]
    readonly: bool,
    queues: Option<u16>,
    format: Option<Format>,
    page_size: Option<ByteSize>,
    r#type: Option<DeviceType>,
    #[serde(default)]
    limits: Limits,
}

#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
struct Limits {
    rate: Option<u32>,
    burst_size: Option<ByteSize>,
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Format {
    Raw,
    Qcow2,
}

fn disk(text: &str) -> Result<Disk, String> {
    parse(text, Some("path")).map_err(|error| error.to_string())
}

#[test]
fn keys_values_and_the_positional_word() {
    let expected = Disk {
        path: "a,b=c".into(),
        readonly: true,
        queues: Some(4),
        format: Some(Format::Raw),
        page_size: Some(ByteSize(2 << 20)),
        r#type: Some(DeviceType::BLOCK),
        limits: Limits::default(),
    };
    assert_eq!(disk("path=a,,b=c,readonly,queues=4,format=raw,page-size=2M,type=2"), Ok(expected));
    assert_eq!(disk("/x=y").unwrap().path, PathBuf::from("/x=y"));
}

#[test]
fn a_dot_leads_into_a_table() {
    let limits = Limits { rate: Some(7), burst_size: Some(ByteSize(4096)) };
    let expected = Disk { path: "a".into(), limits, ..Disk::default() };
    assert_eq!(disk("a,limits.rate=7,limits.burst-size=4k"), Ok(expected));
    let from_file: Disk = toml::from_str("path = 'a'\nlimits.rate = 7\nlimits.burst-size = '4k'").unwrap();
    assert_eq!(disk("a,limits.rate=7,limits.burst-size=4k"), Ok(from_file));
    for path in ["a.raw", "a.b=c", "A=c", "a_b=c"] {
        assert_eq!(disk(path).unwrap().path, PathBuf::from(path));
    }
}

#[test]
fn errors_name_the_key_and_the_nearest_word() {
    for (text, message) in [
        ("a,redonly=on", "unknown key 'redonly' (did you mean 'readonly'?); the keys are: path, readonly"),
        ("a,format=qcow", "format: 'qcow' is not one of: raw, qcow2 (did you mean 'qcow2'?)"),
        ("a,readonly=maybe", "readonly: 'maybe' is neither on nor off"),
        ("a,queues=many", "queues: 'many' is no valid number"),
        ("a,queues=70000", "queues: '70000' is no valid number: it is at most 65535"),
        ("a,queues", "'queues' needs a value: queues=N"),
        ("a,format", "'format' needs a value: format=raw|qcow2"),
        ("a,type", "'type' needs a value: type=..."),
        ("a,page-size=2X", "page-size: '2X' is no size"),
        ("a,type=blokc", "type: 'blokc' is no virtio device type (did you mean 'block'?)"),
        ("a,path=b", "'path' is given twice"),
        ("a,limits.rate=1,limits.rate=2", "'limits.rate' is given twice"),
        ("a,limits.rat=1", "limits: unknown key 'rat' (did you mean 'rate'?); the keys are: rate"),
        ("a,limits.rate=x", "limits.rate: 'x' is no valid number"),
        ("a,queues.x=1", "queues: "),
        ("a,limits=1", "'limits' has no value but keys of its own: limits.rate=VALUE"),
        ("a,page_size=4k", "unknown key 'page_size' (did you mean 'page-size'?)"),
        ("a,readOnly", "unknown key 'readOnly' (did you mean 'readonly'?)"),
        ("a,limits.burst_size=4k", "limits: unknown key 'burst_size' (did you mean 'burst-size'?)"),
        ("readonly=on", "'path=' is missing"),
        ("a,Über", "'Über' is not of the form key=value"),
    ] {
        let said = disk(text).unwrap_err();
        assert!(said.contains(message), "{text}: {said}");
    }
}

#[test]
fn the_same_struct_reads_a_file() {
    let from_file: Disk = toml::from_str("path = 'd'\nreadonly = true\npage-size = 4096\ntype = 2").unwrap();
    assert_eq!(disk("d,readonly=on,page-size=4k,type=block"), Ok(from_file));
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text: String) {
        let _ = disk(&text);
    }

    #[test]
    fn a_doubled_comma_is_a_comma(path in "[^,]+(,[^,]+)*") {
        let text = format!("path={}", path.replace(',', ",,"));
        prop_assert_eq!(disk(&text).unwrap().path, PathBuf::from(path));
    }
}

#[test]
fn a_list_takes_its_key_several_times_and_nothing_else_does() {
    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Lists {
        #[serde(default)]
        port: Vec<u16>,
        name: Option<String>,
        #[serde(default)]
        limits: Limits,
    }
    let lists = |text: &str| parse::<Lists>(text, None).map_err(|error| error.to_string());
    let ports = |text: &str| lists(text).map(|lists| lists.port);
    assert_eq!(ports("name=a"), Ok(vec![]));
    assert_eq!(ports("port=1,name=a"), Ok(vec![1]));
    assert_eq!(ports("port=1,name=a,port=2,port=3"), Ok(vec![1, 2, 3]));
    assert_eq!(ports("port=1,port=x"), Err("port: 'x' is no valid number".to_owned()));
    assert_eq!(ports("port"), Err("'port' needs a value: port=N".to_owned()));
    assert_eq!(ports("name=a,name=b"), Err("'name' is given twice".to_owned()));
    assert_eq!(ports("limits=a,limits=b"), Err("'limits' is given twice".to_owned()));
    assert_eq!(ports("limits.rate=1,limits=b"), Err("'limits' is given twice".to_owned()));
    assert_eq!(ports("port=1,port.x=2"), Err("'port.x' is given twice".to_owned()));
    assert!(ports("port.x=2").is_err());
}
