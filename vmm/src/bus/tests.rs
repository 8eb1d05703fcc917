use std::sync::Mutex;

use proptest::prelude::*;

use super::*;

/// Reads as its own number; remembers the offsets written.
struct Probe(u8, Mutex<Vec<u64>>);

impl Probe {
    fn new(number: u8) -> Arc<Self> {
        Arc::new(Self(number, Mutex::default()))
    }
}

impl BusDevice for Probe {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(self.0);
    }

    fn write(&self, offset: u64, _data: &[u8]) {
        self.1.lock().unwrap().push(offset);
    }
}

fn read4(bus: &Bus, address: u64) -> u32 {
    let mut data = [0; 4];
    bus.read(address, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn an_access_reaches_the_device_that_has_all_of_it() {
    let bus = Bus::new();
    let device = Probe::new(7);
    bus.insert(0x1000, 0x10, device.clone()).unwrap();
    assert_eq!(read4(&bus, 0x1000), 0x0707_0707);
    assert_eq!(read4(&bus, 0x100c), 0x0707_0707);
    for outside in [0xffc, 0xffe, 0x100d, 0x1010, u64::MAX, u64::MAX - 3] {
        assert_eq!(read4(&bus, outside), u32::MAX, "{outside:#x}");
        bus.write(outside, &[0; 4]);
    }
    bus.write(0x1004, &[0; 4]);
    assert_eq!(*device.1.lock().unwrap(), [4]);
    assert!(bus.remove(0x1000) && !bus.remove(0x1000));
    assert_eq!(read4(&bus, 0x1000), u32::MAX);
}

#[test]
fn the_last_address_is_usable_and_nothing_lies_past_it() {
    let bus = Bus::new();
    bus.insert(u64::MAX - 7, 8, Probe::new(1)).unwrap();
    assert_eq!(read4(&bus, u64::MAX - 3), 0x0101_0101);
    assert!(matches!(bus.insert(u64::MAX - 7, 9, Probe::new(2)), Err(BusError::NoRange { .. })));
    assert!(matches!(bus.insert(0, 0, Probe::new(2)), Err(BusError::NoRange { .. })));
}

#[test]
fn a_device_may_change_its_bus_while_it_is_written_to() {
    struct Leaver(Mutex<Option<Arc<Bus>>>);
    impl BusDevice for Leaver {
        fn read(&self, _offset: u64, _data: &mut [u8]) {}
        fn write(&self, _offset: u64, _data: &[u8]) {
            let bus = self.0.lock().unwrap().take().unwrap();
            assert!(bus.remove(0));
        }
    }
    let bus = Arc::new(Bus::new());
    bus.insert(0, 8, Arc::new(Leaver(Mutex::new(Some(bus.clone()))))).unwrap();
    bus.write(0, &[0]);
    assert_eq!(read4(&bus, 0), u32::MAX);
}

proptest! {
    #[test]
    fn ranges_never_overlap(ranges in prop::collection::vec((0u64..64, 1u64..16), 1..20)) {
        let bus = Bus::new();
        let mut owner = [0xffu8; 96];
        for (number, (start, len)) in ranges.into_iter().enumerate() {
            let cells = &mut owner[start as usize..(start + len) as usize];
            let free = cells.iter().all(|cell| *cell == 0xff);
            prop_assert_eq!(bus.insert(start, len, Probe::new(number as u8)).is_ok(), free);
            if free {
                cells.fill(number as u8);
            }
        }
        for (address, expected) in owner.into_iter().enumerate() {
            let mut data = [0];
            bus.read(address as u64, &mut data);
            prop_assert_eq!(data[0], expected);
        }
    }
}
