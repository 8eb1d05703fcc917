use cleave_common::options;
use cleave_common::size::ByteSize;

use super::*;

fn file(text: &str) -> Settings {
    toml::from_str(text).unwrap()
}

fn bootable() -> Settings {
    Settings { kernel: Some("vmlinuz".into()), ..Settings::default() }
}

fn refusal(settings: Settings) -> String {
    settings.validate().unwrap_err().to_string()
}

#[test]
fn the_command_line_and_the_file_say_the_same() {
    let from_file = file(
        r#"
        kernel = "vmlinuz"
        cpus = 2
        memory = "2G"
        uart = "unix=/run/vm.sock"
        [[disk]]
        path = "debian.raw"
        readonly = true
        [[device]]
        type = "rng"
        socket = "/run/rng.sock"
        wait = "2min"
        "#,
    );
    let from_flags = Settings {
        cpus: Some(2),
        memory: Some(options::parse("2G", Some("size")).unwrap()),
        uart: Some("unix=/run/vm.sock".parse().unwrap()),
        disk: vec![options::parse("debian.raw,readonly=on", Some("path")).unwrap()],
        device: vec![options::parse("type=rng,socket=/run/rng.sock,wait=120s", None).unwrap()],
        ..bootable()
    };
    assert_eq!(from_file, from_flags);
    assert_eq!(
        file("[memory]\nsize = '1G'\nbacking = 'hugetlbfs'\npage-size = '2M'").memory,
        Some(options::parse("size=1G,backing=hugetlbfs,page-size=2M", None).unwrap())
    );
}

#[test]
fn a_file_with_an_unknown_key_is_refused() {
    for text in
        ["kernal = 'x'", "[memory]\nsize = '1G'\nprefalt = true", "[[disk]]\npath = 'x'\nread-only = true"]
    {
        let error = toml::from_str::<Settings>(text).unwrap_err().to_string();
        assert!(error.contains("unknown field"), "{error}");
    }
}

#[test]
fn flags_override_and_lists_add_up() {
    let merged = file("kernel = 'a'\ncpus = 4\n[[disk]]\npath = 'root.raw'").overridden_by(Settings {
        cpus: Some(1),
        disk: vec![options::parse("data.raw", Some("path")).unwrap()],
        ..Settings::default()
    });
    assert_eq!(merged.cpus, Some(1));
    assert_eq!(merged.kernel, Some("a".into()));
    let paths: Vec<_> = merged.disk.iter().map(|disk| disk.path.to_str().unwrap()).collect();
    assert_eq!(paths, ["root.raw", "data.raw"]);
}

#[test]
fn a_disk_says_whether_its_daemon_is_started_again() {
    let disk = |text| options::parse::<DiskConfig>(text, Some("path"));
    let plain = disk("a.raw").unwrap();
    assert_eq!((plain.restart, plain.restart_limit), (Restart::Always, None));
    let limited = disk("a.raw,restart=on-failure,restart-limit=3").unwrap();
    assert_eq!((limited.restart, limited.restart_limit), (Restart::OnFailure, Some(3)));
    let in_file = file("[[disk]]\npath = 'a.raw'\nrestart = 'never'").disk;
    assert_eq!(in_file[0].restart, Restart::Never);
    let error = disk("a.raw,restart=sometimes").unwrap_err().to_string();
    assert!(error.contains("on-failure"), "{error}");
}

#[test]
fn the_smallest_machine() {
    let config = bootable().validate().unwrap();
    assert_eq!(config.cpus, 1);
    assert_eq!(config.memory.size, ByteSize(512 << 20));
    assert_eq!(config.append, "console=ttyS0");
    assert_eq!(config.uart, UartConfig::Stdio);
}

#[test]
fn what_cannot_be_is_refused_with_a_reason() {
    assert!(refusal(Settings::default()).contains("--kernel"));
    for cpus in [0, 65, 255] {
        assert!(refusal(Settings { cpus: Some(cpus), ..bootable() }).contains("1 to 64"));
    }
    for (memory, reason) in [
        ("1M", "at least 16M"),
        ("16777217", "multiple of 4K"),
        ("1G,page-size=2M", "goes with backing=hugetlbfs"),
        ("1G,backing=hugetlbfs,page-size=4M", "2M and 1G"),
        ("513M,backing=hugetlbfs", "multiple of 2M"),
        ("1536M,backing=hugetlbfs,page-size=1G", "multiple of 1G"),
    ] {
        let memory = Some(options::parse(memory, Some("size")).unwrap());
        let said = refusal(Settings { memory, ..bootable() });
        assert!(said.contains(reason), "{said}");
    }
}

#[test]
fn devices_are_told_apart_and_fit_the_bus() {
    let disk = |text: &str| options::parse::<DiskConfig>(text, Some("path")).unwrap();
    let twice = |first: &str, second: &str| Settings { disk: vec![disk(first), disk(second)], ..bootable() };
    assert!(refusal(twice("a", "a,readonly=on")).contains("given twice"));
    assert!(twice("a,readonly=on", "a,readonly=on").validate().is_ok());
    assert!(refusal(twice("a,id=x", "b,id=x")).contains("'x'"));
    assert!(refusal(twice("a", "b,queues=0")).contains("1 to 64 queues"));
    let many = (0..32).map(|n| disk(&format!("d{n}"))).collect();
    assert!(refusal(Settings { disk: many, ..bootable() }).contains("room for 31"));
}

#[test]
fn a_uart_that_is_none_names_the_nearest() {
    let error = "stido".parse::<UartConfig>().unwrap_err();
    assert!(error.contains("did you mean 'stdio'?"), "{error}");
    assert!("file=".parse::<UartConfig>().is_err());
    assert!("unix".parse::<UartConfig>().is_err());
}
