use std::sync::atomic::AtomicBool;

use proptest::prelude::*;

use super::*;

const WINDOW: u64 = 0x80_0000_0000;
const ECAM: u64 = 0xe000_0000;
const SIZE: u64 = 0x8000;

/// One BAR, which answers its offset and remembers where it was moved.
#[derive(Default)]
struct Device {
    moves: Mutex<Vec<Option<u64>>>,
    written: Mutex<Vec<(u64, Vec<u8>)>>,
    reset: Mutex<Option<ResetToken>>,
}

impl PciDevice for Device {
    fn config_space(&self) -> ConfigSpace {
        let mut config = ConfigSpace::new(Identity { vendor: 0x1af4, device: 0x1042, ..HOST_BRIDGE });
        config.add_bar(0, SIZE);
        let at = config.add_capability(9, &[1, 2, 3]);
        assert_eq!((at, config.add_capability(0x11, &[0; 10])), (0x40, 0x48));
        config
    }

    fn read_bar(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        data.copy_from_slice(&offset.to_le_bytes()[..data.len()]);
    }

    fn write_bar(&self, _bar: u8, offset: u64, data: &[u8]) {
        self.written.lock().unwrap().push((offset, data.to_vec()));
    }

    fn bar_moved(&self, bar: u8, address: Option<u64>) {
        assert_eq!(bar, 0);
        self.moves.lock().unwrap().push(address);
    }

    fn reset(&self, token: ResetToken) {
        *self.reset.lock().unwrap() = Some(token);
    }
}

struct Fixture {
    pio: Bus,
    mmio: Arc<Bus>,
    root: Arc<Root>,
    device: Arc<Device>,
}

fn fixture() -> Fixture {
    let (pio, mmio) = (Bus::new(), Arc::new(Bus::new()));
    let root = Root::new(&mmio, WINDOW, 1 << 30);
    let device = Arc::new(Device::default());
    root.add(3, Arc::clone(&device) as _).unwrap();
    root.attach(&pio, &mmio, ECAM).unwrap();
    Fixture { pio, mmio, root, device }
}

impl Fixture {
    fn ecam(slot: u64, register: u64) -> u64 {
        ECAM + (slot << 15) + register
    }

    fn read(&self, slot: u64, register: u64) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(Self::ecam(slot, register), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, slot: u64, register: u64, value: u32) {
        self.mmio.write(Self::ecam(slot, register), &value.to_le_bytes());
    }

    fn port_read(&self, address: u32, byte: u64, len: usize) -> u32 {
        self.pio.write(CONFIG_PORTS, &address.to_le_bytes());
        let mut data = [0; 4];
        self.pio.read(CONFIG_PORTS + 4 + byte, &mut data[..len]);
        u32::from_le_bytes(data)
    }

    fn enable(&self) {
        self.write(3, 4, 2);
    }
}

#[test]
fn both_ways_lead_to_the_same_configuration_space() {
    let f = fixture();
    assert_eq!(f.read(3, 0), 0x1042_1af4);
    assert_eq!(f.port_read(1 << 31 | 3 << 11, 0, 4), 0x1042_1af4);
    assert_eq!(f.port_read(1 << 31 | 3 << 11, 2, 2), 0x1042);
    assert_eq!(f.read(0, 8) >> 16, 0x0600, "a host bridge is in slot 0");
    for nobody in [Fixture::ecam(4, 0), Fixture::ecam(3, 0x1000)] {
        let mut data = [0; 4];
        f.mmio.read(nobody, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
    assert_eq!(f.port_read(1 << 31 | 1 << 16 | 3 << 11, 0, 4), u32::MAX, "bus 1");
    assert_eq!(f.port_read(3 << 11, 0, 4), u32::MAX, "not enabled");
    assert_eq!(f.read(3, 0x100), u32::MAX, "no extended configuration space");
    let mut address = [0; 4];
    f.pio.write(CONFIG_PORTS + 3, &[1]);
    f.pio.read(CONFIG_PORTS, &mut address);
    assert_eq!(u32::from_le_bytes(address), 3 << 11, "a byte write is none to the address register");
}

#[test]
fn capabilities_are_linked() {
    let f = fixture();
    assert_eq!(f.read(3, 4) >> 16 & 0x10, 0x10);
    assert_eq!(f.read(3, 0x34) & 0xff, 0x40);
    assert_eq!(f.read(3, 0x40), 0x0201_4809);
    assert_eq!(f.read(3, 0x48) & 0xffff, 0x0011);
}

#[test]
fn a_bar_tells_its_size_and_goes_back() {
    let f = fixture();
    assert_eq!((f.read(3, 0x10), f.read(3, 0x14)), (0x4, (WINDOW >> 32) as u32));
    f.write(3, 0x10, u32::MAX);
    f.write(3, 0x14, u32::MAX);
    assert_eq!((f.read(3, 0x10), f.read(3, 0x14)), (!(SIZE as u32 - 1) | 0x4, u32::MAX));
    for unused in [0x18, 0x1c, 0x20, 0x24, 0x30] {
        f.write(3, unused, u32::MAX);
        assert_eq!(f.read(3, unused), 0);
    }
    f.write(3, 0x10, 0);
    f.write(3, 0x14, 0x80);
    assert!(f.device.moves.lock().unwrap().is_empty(), "memory is off all the time");
    f.enable();
    assert_eq!(*f.device.moves.lock().unwrap(), [Some(WINDOW)]);
    let mut data = [0; 2];
    f.mmio.read(WINDOW + 0x1234, &mut data);
    assert_eq!(data, [0x34, 0x12]);
}

#[test]
fn a_bar_moves_with_its_registers_and_sizing_it_live_maps_nothing() {
    let f = fixture();
    f.enable();
    f.write(3, 0x10, 0x4000_0000);
    let mut data = [0; 2];
    f.mmio.read(WINDOW + 0x1234, &mut data);
    assert_eq!(data, [0xff; 2]);
    f.mmio.write(WINDOW + 0x4000_0010, &[5]);
    assert_eq!(*f.device.written.lock().unwrap(), [(0x10, vec![5])]);
    f.write(3, 0x10, u32::MAX);
    f.write(3, 0x14, u32::MAX);
    assert_eq!(f.device.moves.lock().unwrap().last(), Some(&None));
    f.write(3, 4, 0);
    f.write(3, 0x10, 0);
    f.write(3, 0x14, 0);
    f.enable();
    assert_eq!(f.device.moves.lock().unwrap().last(), Some(&None), "address zero is none");
}

#[test]
fn a_bar_on_top_of_something_else_stays_unmapped() {
    let f = fixture();
    f.write(3, 0x10, ECAM as u32);
    f.write(3, 0x14, 0);
    f.enable();
    assert!(f.device.moves.lock().unwrap().is_empty());
    assert_eq!(f.read(3, 0), 0x1042_1af4);
    f.write(3, 0x14, 0x81);
    assert_eq!(*f.device.moves.lock().unwrap(), [Some(0x81_e000_0000)]);
}

#[test]
fn a_reset_is_complete_when_the_last_device_is() {
    let f = fixture();
    f.enable();
    f.write(3, 0x3c, 0x0b);
    let complete = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&complete);
    f.root.reset(move || flag.store(true, Ordering::SeqCst));
    assert_eq!(f.read(3, 4) & 0xffff, 0);
    assert_eq!(f.read(3, 0x3c), 0);
    assert_eq!(*f.device.moves.lock().unwrap(), [Some(WINDOW), None]);
    assert!(!complete.load(Ordering::SeqCst));
    f.device.reset.lock().unwrap().take();
    assert!(complete.load(Ordering::SeqCst));
}

#[test]
fn slots_and_window_are_bounded() {
    let f = fixture();
    let new = || Arc::new(Device::default());
    assert!(matches!(f.root.add(3, new()), Err(PciError::SlotTaken(3))));
    assert!(matches!(f.root.add(0, new()), Err(PciError::NoSlot(0))));
    assert!(matches!(f.root.add(32, new()), Err(PciError::NoSlot(32))));
    let small = Root::new(&Arc::new(Bus::new()), 0x1000, SIZE);
    assert!(matches!(small.add(1, new()), Err(PciError::WindowFull { slot: 1, .. })));
}

proptest! {
    #[test]
    fn no_configuration_access_panics_and_the_bar_is_where_it_decodes(
        steps in prop::collection::vec((0u64..0x1010, any::<u64>(), 0usize..4, any::<bool>()), 0..100)) {
        let f = fixture();
        for (register, value, len, write) in steps {
            let len = 1 << len;
            if write {
                f.mmio.write(Fixture::ecam(3, register), &value.to_le_bytes()[..len]);
            } else {
                f.mmio.read(Fixture::ecam(3, register), &mut [0; 8][..len]);
            }
            prop_assert_eq!(f.read(3, 0), 0x1042_1af4);
            let function = f.root.slots[3].get().unwrap().state.lock().unwrap();
            let decoded = function.config.decoded(0);
            let mapped = f.device.moves.lock().unwrap().last().copied().flatten();
            // Nothing but ECAM is in the way.
            let blocked = decoded.is_some_and(|at| at < ECAM + ECAM_LEN && at + SIZE > ECAM);
            prop_assert_eq!(mapped, decoded.filter(|_| !blocked));
        }
    }
}
