use cleave_common::options;
use cleave_common::size::ByteSize;
use proptest::prelude::*;

use super::*;

fn file(text: &str) -> Settings {
    parse_file(text).unwrap()
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
fn a_file_that_is_wrong_is_refused_in_one_line() {
    for (text, message) in [
        (
            "cpus = 1\nkernal = 'x'",
            "line 2: unknown key 'kernal' (did you mean 'kernel'?); the keys are: kernel, ",
        ),
        (
            "[memory]\nsize = '1G'\nprefalt = true",
            "line 3: memory: unknown key 'prefalt' (did you mean 'prefault'?); the keys are: size, backing, page-size, mem-path, ",
        ),
        ("memory = { backing = 'memfd' }", "line 1: memory: 'size' is missing"),
        ("memory = '2X'", "line 1: memory: size: '2X' is no size"),
        ("memory = 512", "line 1: memory: 512 is given where there has to be a table, or text"),
        (
            "[[disk]]\npath = 'x'\n[[disk]]\npath = 'y'\nread-only = true",
            "line 5: disk: unknown key 'read-only' (did you mean 'readonly'?)",
        ),
        (
            "[[disk]]\npath = 'x'\ncache = 'nome'",
            "line 3: disk: cache: 'nome' is not one of: none, writeback, writethrough (did you mean 'none'?)",
        ),
        ("[[disk]]\npath = 7", "line 2: disk: path: 7 is no text: write it in quotes"),
        (
            "[[disk]]\npath = 'x'\nreadonly = 'perhaps'",
            "line 3: disk: readonly: 'perhaps' is neither true nor false",
        ),
        (
            "disk = 'x'",
            "line 1: disk: 'x' is no list: write [...], or begin each of them with a line [[...]]",
        ),
        ("disk = ['x']", "line 1: disk: 'x' is no table of keys"),
        ("cpus = 'abc'", "line 1: cpus: 'abc' is no valid number: it has to be a whole one"),
        ("cpus = -1", "line 1: cpus: -1 is no valid number: it is out of range"),
        ("cpus = 1.5", "line 1: cpus: 1.5 is no valid number"),
        (
            "uart = 'stido'",
            "line 1: uart: 'stido' is not one of: stdio, pty, file=PATH, unix=PATH, off (did you mean 'stdio'?)",
        ),
        ("uart = 1979-05-27", "line 1: uart: 1979-05-27 is neither text in quotes nor a whole number"),
        ("cpus = 2\ncpus = 3", "line 2: this is no TOML: duplicate key, at 'cpus'"),
        ("kernel = vmlinuz", "line 1: this is no TOML: "),
        ("\u{1}\u{2}", "line 1: this is no TOML: "),
        ("uart = 'a\\nb'", "line 1: uart: 'a\\nb' is not one of"),
        ("uart = \"a\\nb\"", "line 1: uart: 'a\\nb' is not one of"),
    ] {
        let said = parse_file(text).unwrap_err().to_string();
        assert!(said.starts_with(message), "{text}:\n{said}");
        assert!(!said.contains(char::is_control), "{said:?}");
    }
    assert_eq!(file("sandbox = 'off'").sandbox, Some(false));
    assert_eq!(file("sandbox = true\ncpus = 0x10").cpus, Some(16));
}

proptest! {
    #[test]
    fn no_file_makes_it_panic(text: String) {
        let _ = parse_file(&text);
    }

    #[test]
    fn no_value_makes_it_panic(key in "kernel|cpus|memory|uart|disk|device", value in r"[\[\]{}=',0-9a-z. -]{0,20}") {
        if let Err(error) = parse_file(&format!("{key} = {value}")) {
            prop_assert!(!error.to_string().contains(char::is_control));
        }
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
    let text = "[[disk]]\npath = 'a.raw'\nthrottle = 5";
    let error = parse_file(text).unwrap_err().to_string();
    assert!(error.contains("throttle: 5 is no table of keys"), "{error}");
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
    for cpus in [0, 65, 70_000] {
        assert!(refusal(Settings { cpus: Some(cpus), ..bootable() }).contains("1 to 64"));
    }
    for (memory, reason) in [
        ("1M", "at least 16M"),
        ("16777217", "multiple of 4K"),
        ("1G,page-size=2M", "goes with backing=hugetlbfs"),
        ("1G,backing=hugetlbfs,page-size=4M", "2M and 1G"),
        ("513M,backing=hugetlbfs", "multiple of 2M"),
        ("1536M,backing=hugetlbfs,page-size=1G", "multiple of 1G"),
        ("1536M,mem-path=/dev/hugepages,page-size=1G", "multiple of 1G"),
        ("513M,mem-path=/dev/hugepages", "multiple of 2M"),
        ("1G,mem-path=/dev/hugepages,backing=memfd", "leave one of them out"),
        ("1G,mem-path=", "the path is empty"),
        ("1G,backing=hugetlbfs,thp=always", "hugetlbfs has huge pages always"),
        ("1G,mem-path=/dev/hugepages,thp=never", "hugetlbfs has huge pages always"),
        ("1G,prefault=on,prefault-threads=0", "1 to 64 threads"),
        ("1G,prefault=on,prefault-threads=65", "1 to 64 threads"),
        ("1G,prefault-threads=4", "goes with prefault=on"),
        ("1G,merge=on", "use a balloon, free page reporting or swap on the host"),
    ] {
        let memory = Some(options::parse(memory, Some("size")).unwrap());
        let said = refusal(Settings { memory, ..bootable() });
        assert!(said.contains(reason), "{said}");
    }
}

#[test]
fn memory_says_what_it_is_made_of() {
    let memory = |text: &str| options::parse::<MemoryConfig>(text, Some("size"));
    let plain = memory("1G").unwrap();
    assert_eq!(
        (plain.backing(), plain.dump, plain.merge, plain.prefault),
        (Backing::Memfd, true, false, false)
    );
    assert_eq!(plain, MemoryConfig { size: ByteSize(1 << 30), ..MemoryConfig::default() });
    let all = "1G,mem-path=/dev/hugepages,page-size=2M,prefault=on,prefault-threads=4,host-node=0-1,dump=off,merge=off";
    let all = memory(all).unwrap();
    assert_eq!(all.validate(), Ok(()));
    assert_eq!(all.backing(), Backing::Hugetlbfs);
    assert_eq!(all.host_node.as_ref().map(|nodes| nodes.nodes()), Some(&[0, 1][..]));
    assert!(!all.dump);
    let in_file = file(
        "[memory]\nsize = '1G'\nmem-path = '/dev/hugepages'\npage-size = '2M'\nprefault = true\nprefault-threads = 4\n\
         host-node = '0-1'\ndump = false",
    );
    assert_eq!(in_file.memory, Some(all));
    assert_eq!(file("[memory]\nsize = '1G'\nhost-node = 1").memory, Some(memory("1G,host-node=1").unwrap()));
    assert_eq!(memory("1G,thp=never").unwrap().thp, Some(Thp::Never));
    for (text, message) in [
        ("1G,thp=allways", "thp: 'allways' is not one of: always, never, advise (did you mean 'always'?)"),
        (
            "1G,host-node=first",
            "host-node: 'first' is no list of the host's NUMA nodes: write it as 0 or 0-1",
        ),
        ("1G,host-node=4096", "no host has a NUMA node 4096"),
        ("1G,mem_path=/x", "did you mean 'mem-path'?"),
        ("1G,prefault-threads=many", "prefault-threads: 'many' is no valid number"),
    ] {
        let said = memory(text).unwrap_err().to_string();
        assert!(said.contains(message), "{text}: {said}");
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
    assert!(
        refusal(twice("a", "b,restart=never,restart-limit=3")).contains("--disk b: restart-limit=3 says")
    );
    for (keys, reason) in [
        ("io-timeout=500ms", "at least 1s"),
        ("io-timeout=30s,on-full=pause", "leave one of them out"),
        ("io-timeout=30s,restart=never", "restart=never forbids that"),
    ] {
        let said = refusal(twice("a", &format!("b,{keys}")));
        assert!(said.starts_with("--disk b: io-timeout=: ") && said.contains(reason), "{said}");
    }
    assert!(twice("a", "b,io-timeout=30s,restart-limit=3").validate().is_ok());
    let device = options::parse("type=net,socket=/s,queues=0", None).unwrap();
    let said = refusal(Settings { device: vec![device], ..bootable() });
    assert!(said.contains("--device net0: queues=0: a device has 1 to 256 queues"), "{said}");
    let contradiction = disk("a,throttle.iops-read-max=5");
    let said = refusal(Settings { disk: vec![contradiction], ..bootable() });
    assert!(said.contains("--disk a: throttle: iops-read-max needs a rate"), "{said}");
    assert!(refusal(twice("a,id=disk1", "b")).contains("two devices are named 'disk1'"));
    let one = |text: &str| Settings { disk: vec![disk(text)], ..bootable() };
    for id in ["", "a/b", "-a", "..", "a b", "\u{e9}", &"x".repeat(33)] {
        let said = refusal(one(&format!("a,id={id}")));
        assert!(said.contains("1 to 32 letters"), "{said}");
    }
    assert!(one("a,id=root-disk_1.x").validate().is_ok());
    assert!(refusal(one("a,serial=123456789012345678901")).contains("up to 20 bytes"));
    assert!(refusal(one("a,serial=\u{e9}")).contains("printable ASCII"));
    assert!(one("a,serial=12345678901234567890").validate().is_ok());
    assert!(refusal(one("path=")).contains("empty"));
    let many = (0..32).map(|n| disk(&format!("d{n}"))).collect();
    assert!(refusal(Settings { disk: many, ..bootable() }).contains("room for 31"));
}

#[test]
fn networks_are_told_apart_and_none_leaves_out_those_before() {
    let nets = |texts: &[&str]| Settings {
        net: texts.iter().map(|text| options::parse(text, Some("kind")).unwrap()).collect(),
        ..bootable()
    };
    let names = |texts: &[&str]| -> Vec<String> {
        nets(texts).validate().unwrap().nets.into_iter().map(|net| net.name).collect()
    };
    assert_eq!(names(&["tap=a", "socket=/s", "tap=b,id=lan"]), ["net0", "net1", "lan"]);
    assert_eq!(names(&["user", "user,hostfwd=tcp:1:2,hostfwd=udp:3:4,direct,id=x"]), ["net0", "x"]);
    assert_eq!(names(&["tap=a", "none"]), [""; 0]);
    assert_eq!(names(&["tap=a", "none", "tap=a"]), ["net0"]);
    for (texts, reason) in [
        (&["queues=2"][..], "tap=NAME, user, socket=PATH, none"),
        (&["tap=a,socket=/s"], "tap=NAME, user, socket=PATH, none"),
        (&["user,tap=a"], "it takes one of"),
        (&["user,socket=/s"], "it takes one of"),
        (&["none,hostfwd=tcp:1:2"], "'none' stands alone"),
        (&["tap=a,hostfwd=tcp:1:2"], "hostfwd= goes with user"),
        (&["socket=/s,host=on"], "host= goes with user"),
        (&["tap=a,direct=off"], "direct= goes with user"),
        (&["user,bridge=br0"], "bridge= does not go with user"),
        (&["user,queues=1"], "queues= does not go with user"),
        (&["user,wait=3s"], "wait= is for"),
        (&["user,mtu=65521"], "with user it is 68 to 65520"),
        (&["user,direct=on,mac=52:54:00:12:34:56"], "mac= does not go with direct=on"),
        (&["user,direct=on,cpus=1"], "cpus= does not go with direct=on"),
        (&["user,direct=on,throttle.bps-rx=5"], "throttle= does not go with direct=on"),
        (&["user,direct=on,pcap=/a"], "pcap= does not go with direct=on"),
        (&["user,pcap-snaplen=96"], "pcap-snaplen=96"),
        (&["user,restart=never,restart-limit=2"], "leave one of them out"),
        (&["user,id=x", "user,direct=on,id=x"], "two devices are named 'x'"),
        (&["none,tap=a"], "'none' stands alone"),
        (&["tap=a,queues=0"], "1 to 64 pairs"),
        (&["tap=a,queues=65"], "1 to 64 pairs"),
        (&["socket=/s,queues=0"], "queues=0: a device has 1 to 256 queues"),
        (&["socket=/s,queues=60000"], "1 to 256 queues"),
        (&["tap=a,mtu=67"], "68 to 65521"),
        (&["tap=a,wait=3s"], "wait= is for"),
        (&["tap=a/b"], "tap=\"a/b\": an interface's name"),
        (&["tap="], "1 to 15 bytes"),
        (&["tap=a,bridge=sixteen-letters-"], "1 to 15 bytes"),
        (&["socket=/s,mac=52:54:00:12:34:56"], "mac= is for a daemon that cleave starts"),
        (&["tap=a,restart=never,restart-limit=2"], "leave one of them out"),
        (&["socket="], "--net socket=: the path is empty"),
        (&["tap=a,throttle.bps-rx-max=5"], "throttle: bps-rx-max needs a rate"),
        (&["tap=a,pcap-snaplen=96"], "pcap-snaplen=96"),
        (&["socket=/s,throttle.bps-rx=5"], "throttle= is for a daemon that cleave starts"),
        (&["tap=a", "tap=a,id=b"], "the tap device a is given twice"),
        (&["tap=a,id=x", "tap=b,id=x"], "two devices are named 'x'"),
        (&["tap=a,id=-"], "1 to 32 letters"),
    ] {
        let said = refusal(nets(texts));
        assert!(said.contains(reason), "{texts:?}: {said}");
    }
}

#[test]
fn a_file_has_forwarded_ports_as_an_array() {
    let net = file("[[net]]\nkind = 'user'\nhostfwd = ['tcp:2222:22', 'udp:1:2']\nhost = true").net;
    assert_eq!(
        net,
        [options::parse("user,hostfwd=tcp:2222:22,hostfwd=udp:1:2,host=on", Some("kind")).unwrap()]
    );
    let refused = |text: &str| {
        parse_file(&format!("[[net]]\nkind = 'user'\nhostfwd = {text}")).unwrap_err().to_string()
    };
    assert!(refused("['tcp:22']").starts_with("line 3: net: hostfwd: 'tcp:22' is no forwarded port"));
    assert!(refused("'tcp:2222:22'").contains("is no list: write [...]"));
}

#[test]
fn a_uart_that_is_none_names_the_nearest() {
    let error = "stido".parse::<UartConfig>().unwrap_err();
    assert!(error.contains("did you mean 'stdio'?"), "{error}");
    assert_eq!("file=".parse::<UartConfig>().unwrap_err(), "'file=' needs a path: file=PATH");
    assert_eq!("unix".parse::<UartConfig>().unwrap_err(), "'unix' needs a path: unix=PATH");
}

#[test]
fn a_socket_path_fits_a_unix_socket() {
    let long = |length: usize| format!("/{}", "x".repeat(length - 1));
    let device = |path: &str| {
        let device = options::parse(&format!("type=rng,socket={path}"), None).unwrap();
        Settings { device: vec![device], ..bootable() }
    };
    assert!(device(&long(107)).validate().is_ok());
    let said = refusal(device(&long(108)));
    assert!(
        said.starts_with("--device socket=/xxx")
            && said.contains("has 108 bytes")
            && said.ends_with("at most 107")
    );
    assert!(refusal(device("")).contains("empty"));
    let uart = Some(UartConfig::Unix(long(108).into()));
    assert!(refusal(Settings { uart, ..bootable() }).starts_with("--uart unix=/xxx"));
}

#[test]
fn a_balloon_is_judged_by_the_guests_memory() {
    let with = |text: &str| Settings {
        kernel: Some("k".into()),
        balloon: Some(options::parse(text, Some("kind")).unwrap()),
        ..Settings::default()
    };
    for text in ["on", "target=256M", "on,auto=on,free=64M,stats=5s", "min=16M,target=16M,control=/run/b.ctl"]
    {
        assert!(with(text).validate().unwrap().balloon.is_some(), "{text}");
    }
    assert_eq!(with("off").validate().unwrap().balloon, None);
    let over = with("target=256M").overridden_by(with("off"));
    assert_eq!(over.validate().unwrap().balloon, None);
    for (text, message) in [
        ("off,target=1G", "'off' stands alone"),
        ("auto=on", "--balloon: auto=on takes free=SIZE"),
        ("free=64M", "free= is for auto=on"),
        ("auto=on,free=64M,target=256M", "leave target= out"),
        ("target=1G", "target=1G is more than the guest's memory, 512M"),
        ("target=64M", "target=64M is less than min=128M"),
        ("min=1G", "min=1G is more than the guest's memory"),
        ("stats=1ms", "every 100ms at most"),
        ("restart=never,restart-limit=3", "restart-limit=3"),
        ("id=-", "a device's name"),
        ("control=", "--balloon control=: the path is empty"),
    ] {
        let said = refusal(with(text));
        assert!(said.contains(message), "{text}: {said}");
    }
    let twice = Settings { disk: vec![options::parse("d,id=balloon0", Some("path")).unwrap()], ..with("on") };
    assert!(refusal(twice).contains("two devices are named 'balloon0'"));
}
