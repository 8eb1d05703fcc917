use cleave_common::options;
use proptest::prelude::*;

use super::*;
use crate::config::Settings;

fn config(memory: &str, disks: &[&str], devices: &[&str]) -> MachineConfig {
    let settings = Settings {
        kernel: Some("vmlinuz".into()),
        cpus: Some(2),
        memory: Some(options::parse(memory, Some("size")).unwrap()),
        disk: disks.iter().map(|text| options::parse(text, Some("path")).unwrap()).collect(),
        device: devices.iter().map(|text| options::parse(text, None).unwrap()).collect(),
        ..Settings::default()
    };
    settings.validate().unwrap()
}

#[test]
fn memory_splits_around_the_hole() {
    let below = plan(&config("3G", &[], &[]), 40).unwrap();
    assert_eq!(below.ram, [RamRegion { gpa: 0, size: 3 * GIB, file_offset: 0 }]);
    let above = plan(&config("5G", &[], &[]), 40).unwrap();
    assert_eq!(above.ram[1], RamRegion { gpa: 4 * GIB, size: 2 * GIB, file_offset: 3 * GIB });
    assert_eq!(above.mmio64.base, 6 * GIB);
}

#[test]
fn a_machine_beyond_the_cpu_is_refused() {
    assert!(plan(&config("1000G", &[], &[]), 40).is_ok());
    for memory in ["1024G", "16777215T"] {
        let error = plan(&config(memory, &[], &[]), 40).unwrap_err().to_string();
        assert!(error.contains("40 bits"), "{error}");
    }
}

#[test]
fn slots_are_named_and_numbered_in_order() {
    let config = config("1G", &["a.raw", "b.raw,id=data,readonly=on,queues=3"], &["type=rng,socket=/s"]);
    let slots = plan(&config, 40).unwrap().slots;
    let names: Vec<_> = slots.iter().map(|slot| (slot.name.as_str(), slot.device_number)).collect();
    assert_eq!(names, [("disk0", 1), ("data", 2), ("rng0", 3)]);
    let Backend::Spawn(DaemonSpec { program, args, .. }) = &slots[1].backend else {
        panic!("a disk is spawned")
    };
    assert_eq!(program, "cleave-block");
    let expected = "--blk-file=b.raw --format raw --cache writeback --num-queues 3 --read-only";
    assert_eq!(args.join(" ".as_ref()), *expected);
    assert_eq!(slots[0].queues, Some(2), "a queue for each vCPU");
}

#[test]
fn what_a_disk_is_asked_for_reaches_its_daemon() {
    let disk = "a.raw,on-full=pause,poll-us=50,cpus=1,,3,throttle.iops-total=9,throttle.bps-write=1M";
    let slots = plan(&config("1G", &[disk], &[]), 40).unwrap().slots;
    let Backend::Spawn(DaemonSpec { args, .. }) = &slots[0].backend else { panic!("a disk is spawned") };
    let expected = "--on-full=pause --poll-us=50 --cpus=1,3 --throttle=iops-total=9,bps-write=1048576";
    let args = args.join(" ".as_ref()).into_string().unwrap();
    assert!(args.ends_with(expected), "{args}");
}

#[test]
fn what_a_network_is_asked_for_reaches_its_daemon() {
    let net = "tap=t,throttle.bps-rx=1M,throttle.pps-tx=9,pcap=/a b.pcap,pcap-snaplen=96";
    let settings = Settings {
        kernel: Some("vmlinuz".into()),
        net: vec![options::parse(net, Some("kind")).unwrap()],
        ..Settings::default()
    };
    let slots = plan(&settings.validate().unwrap(), 40).unwrap().slots;
    let Backend::Spawn(DaemonSpec { args, .. }) = &slots[0].backend else { panic!("it is spawned") };
    let expected = "--tap=t --throttle=pps-tx=9,bps-rx=1048576 --pcap=/a b.pcap --pcap-snaplen=96";
    assert_eq!(args.join(" ".as_ref()), *expected);
}

#[test]
fn a_network_is_a_daemon_of_ours_or_somebody_elses() {
    let settings = Settings {
        kernel: Some("vmlinuz".into()),
        disk: vec![options::parse("a.raw", Some("path")).unwrap()],
        net: [
            "tap=tap0,bridge=br0,mac=52:54:00:12:34:56,mtu=1400,queues=2,restart=never",
            "socket=/s,id=lan",
        ]
        .iter()
        .map(|text| options::parse(text, Some("kind")).unwrap())
        .collect(),
        device: vec![options::parse("type=rng,socket=/r", None).unwrap()],
        ..Settings::default()
    };
    let slots = plan(&settings.validate().unwrap(), 40).unwrap().slots;
    let names: Vec<_> = slots.iter().map(|slot| (slot.name.as_str(), slot.device_type.id())).collect();
    assert_eq!(names, [("disk0", 2), ("net0", 1), ("lan", 1), ("rng0", 4)]);
    let Backend::Spawn(spec) = &slots[1].backend else { panic!("a tap device's daemon is spawned") };
    assert_eq!((spec.program.as_str(), spec.restart), ("cleave-net", Restart::Never));
    let expected = "--tap=tap0 --bridge=br0 --mac=52:54:00:12:34:56 --mtu=1400 --queues=2";
    assert_eq!(spec.args.join(" ".as_ref()), *expected);
    let wait = Duration::from_secs(30);
    assert_eq!(slots[2].backend, Backend::Attach { socket: "/s".into(), wait });
}

#[test]
fn a_network_without_privilege_is_passts_with_a_daemon_of_ours_between_or_not() {
    let net = |text: &str| options::parse(text, Some("kind")).unwrap();
    let net = [
        "user,hostfwd=tcp:2222:22,hostfwd=udp:[::1]:5:6,host=on,mac=52:54:00:12:34:56,mtu=1400,poll-us=5,cpus=0-1,\
         throttle.bps-tx=1M,pcap=/a",
        "user",
        "user,direct=on,hostfwd=tcp:2223:22,mtu=1400,restart=on-failure,restart-limit=3",
    ]
    .map(net)
    .into();
    let settings = Settings { kernel: Some("vmlinuz".into()), net, ..Settings::default() };
    let slots = plan(&settings.validate().unwrap(), 40).unwrap().slots;
    let specs: Vec<&DaemonSpec> = slots
        .iter()
        .map(|slot| match &slot.backend {
            Backend::Spawn(spec) => spec,
            Backend::Attach { .. } => panic!("{} is spawned", slot.name),
        })
        .collect();
    assert_eq!(
        specs[0].args.join(" ".as_ref()),
        *"--user --mac=52:54:00:12:34:56 --hostfwd=tcp:127.0.0.1:2222:22 --hostfwd=udp:[::1]:5:6 --host=on --mtu=1400 \
          --poll-us=5 --cpus=0-1 --throttle=bps-tx=1048576 --pcap=/a"
    );
    let mac = specs[1].args[1].to_str().unwrap();
    assert!(mac.starts_with("--mac=") && specs[1].args.len() == 2, "one of its own: {mac}");
    assert_eq!(
        specs.iter().map(|spec| spec.program.as_str()).collect::<Vec<_>>(),
        ["cleave-net", "cleave-net", "passt"]
    );
    let direct = "--vhost-user --foreground --quiet --mtu 1400 --tcp-ports 127.0.0.1/2223:22 --udp-ports none --no-map-gw";
    assert_eq!(specs[2].args.join(" ".as_ref()), *direct);
    assert_eq!(
        (specs[2].restart, specs[2].restart_limit, slots[2].queues),
        (Restart::OnFailure, Some(3), Some(2))
    );
    assert_eq!(
        specs.iter().map(|spec| spec.needs.map(|need| need.option)).collect::<Vec<_>>(),
        [None, None, Some("--vhost-user")]
    );
}

proptest! {
    #[test]
    fn nothing_overlaps(pages in (16_u64 << 8)..(1 << 27), disks in 0..31_usize) {
        let disks: Vec<_> = (0..disks).map(|n| format!("d{n}")).collect();
        let disks: Vec<_> = disks.iter().map(String::as_str).collect();
        let size = pages << 12;
        let plan = plan(&config(&size.to_string(), &disks, &[]), 52).unwrap();
        let mut ranges: Vec<_> = plan.ram.iter().map(|r| (r.gpa, r.size)).collect();
        prop_assert_eq!(ranges.iter().map(|(_, size)| size).sum::<u64>(), size);
        ranges.extend([MMIO32, ECAM].map(|w| (w.base, w.size)));
        ranges.extend([(0xfec0_0000, 0x140_0000)]);
        ranges.extend([(plan.mmio64.base, plan.mmio64.size)]);
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            prop_assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{:x?}", pair);
        }
        prop_assert_eq!(plan.slots.len(), disks.len());
    }
}

#[test]
fn all_scsi_units_are_on_one_adapter() {
    let mut settings = Settings { kernel: Some("vmlinuz".into()), cpus: Some(2), ..Settings::default() };
    settings.scsi = vec![options::parse("disk=a.raw,lun=1", None).unwrap()];
    settings.scsi.push(options::parse("disk=b.qcow2,format=qcow2", None).unwrap());
    settings.cdrom = vec![options::parse("x.iso", Some("path")).unwrap()];
    settings.scsi_controller = Some(options::parse("control=/c,state=/s,restart=never", None).unwrap());
    let slots = plan(&settings.validate().unwrap(), 40).unwrap().slots;
    assert_eq!((slots.len(), slots[0].name.as_str(), slots[0].queues), (1, "scsi0", Some(4)));
    let Backend::Spawn(spec) = &slots[0].backend else { panic!("its daemon is spawned") };
    let expected = "--lun=disk=a.raw,lun=1 --lun=disk=b.qcow2,format=qcow2 --cdrom=path=x.iso --num-queues=2 --control=/c --state=/s";
    assert_eq!(spec.args.join(" ".as_ref()), *expected);
    assert_eq!((spec.program.as_str(), spec.restart), ("cleave-scsi", Restart::Never));
}

#[test]
fn a_balloon_is_a_daemon_that_keeps_state() {
    let settings = Settings {
        kernel: Some("k".into()),
        disk: vec![options::parse("d", Some("path")).unwrap()],
        balloon: Some(
            options::parse(
                "auto=on,free=64M,min=96M,stats=1500ms,reporting=off,control=/c,restart=on-failure",
                Some("kind"),
            )
            .unwrap(),
        ),
        device: vec![options::parse("type=rng,socket=/s", None).unwrap()],
        ..Settings::default()
    };
    let slots = plan(&settings.validate().unwrap(), 40).unwrap().slots;
    let names: Vec<_> = slots.iter().map(|slot| (slot.name.as_str(), slot.device_type.id())).collect();
    assert_eq!(names, [("disk0", 2), ("balloon0", 5), ("rng0", 4)]);
    let Backend::Spawn(spec) = &slots[1].backend else { panic!("a balloon is spawned") };
    assert_eq!((spec.program.as_str(), spec.restart), ("cleave-balloon", Restart::OnFailure));
    assert!(spec.keeps_state);
    assert_eq!(
        spec.args,
        ["--min=96M", "--auto=free=64M", "--reporting=off", "--stats-interval=1.5", "--control=/c"]
    );
}
