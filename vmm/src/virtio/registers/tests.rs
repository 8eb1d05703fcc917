use proptest::prelude::*;

use super::*;

const VECTORS: u16 = 3;
const OFFERED: u64 = features::virtio::VERSION_1 | features::virtio::RING_EVENT_IDX | 0b110;
const ACKNOWLEDGE_DRIVER: u8 = 3;

fn registers() -> Registers {
    Registers::new(OFFERED, 2, 256)
}

impl Registers {
    fn get(&self, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.read(offset, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    fn put(&mut self, offset: u64, len: usize, value: u64) -> Effect {
        self.write(offset, &value.to_le_bytes()[..len], VECTORS)
    }

    fn status(&self) -> u8 {
        self.get(at::STATUS, 1) as u8
    }

    fn put_status(&mut self, value: u8) -> Effect {
        self.put(at::STATUS, 1, u64::from(value))
    }

    fn acknowledge(&mut self, features: u64) {
        for select in 0..2 {
            self.put(at::DRIVER_FEATURE_SELECT, 4, select);
            self.put(at::DRIVER_FEATURE, 4, features >> (32 * select) & 0xffff_ffff);
        }
    }

    /// What a driver does up to FEATURES_OK.
    fn negotiate(&mut self, features: u64) {
        self.put_status(ACKNOWLEDGE_DRIVER);
        self.acknowledge(features);
        self.put_status(ACKNOWLEDGE_DRIVER | status::FEATURES_OK);
    }

    fn run(&mut self) -> Effect {
        self.negotiate(OFFERED);
        self.put(at::QUEUE_SELECT, 2, 1);
        self.put(at::QUEUE_SIZE, 2, 128);
        self.put(at::QUEUE_VECTOR, 2, 2);
        self.put(at::QUEUE_DESC, 4, 0x1000);
        self.put(at::QUEUE_DESC + 4, 4, 1);
        self.put(at::QUEUE_DRIVER, 8, 0x2000);
        self.put(at::QUEUE_DEVICE, 8, 0x3000);
        self.put(at::QUEUE_ENABLE, 2, 1);
        self.put_status(ACKNOWLEDGE_DRIVER | status::FEATURES_OK | status::DRIVER_OK)
    }
}

#[test]
fn the_offer_is_read_in_words() {
    let mut registers = registers();
    let words: Vec<u64> = (0..4)
        .map(|select| {
            registers.put(at::DEVICE_FEATURE_SELECT, 4, select);
            registers.get(0x04, 4)
        })
        .collect();
    assert_eq!(words, [OFFERED & 0xffff_ffff, OFFERED >> 32, 0, 0]);
    assert_eq!(registers.get(0x12, 2), 2, "queues");
}

#[test]
fn features_ok_stays_only_with_a_subset_that_has_version_1() {
    for (features, good) in [
        (OFFERED, true),
        (features::virtio::VERSION_1, true),
        (OFFERED | 1, false),
        (OFFERED & !features::virtio::VERSION_1, false),
        (0, false),
    ] {
        let mut registers = registers();
        registers.negotiate(features);
        assert_eq!(registers.status() & status::FEATURES_OK != 0, good, "{features:#x}");
        if good {
            registers.acknowledge(0);
            assert_eq!(registers.features(), features, "they are frozen");
        }
    }
    let mut registers = registers();
    registers.put(at::DRIVER_FEATURE_SELECT, 4, 7);
    registers.put(at::DRIVER_FEATURE, 4, 1);
    registers.negotiate(OFFERED);
    assert_eq!(registers.status(), ACKNOWLEDGE_DRIVER, "a bit beyond those that exist");
}

#[test]
fn driver_ok_starts_what_was_enabled_and_only_once() {
    let mut registers = registers();
    assert_eq!(registers.run(), Effect::Start);
    let queues: Vec<_> = registers.enabled_queues().map(|(index, queue)| (index, *queue)).collect();
    let [(1, queue)] = queues[..] else { panic!("{queues:?}") };
    assert_eq!((queue.size, queue.vector), (128, 2));
    let RingAddresses { descriptor, available, used } = queue.addresses;
    assert_eq!((descriptor, available, used), (0x1_0000_1000, 0x2000, 0x3000));
    assert_eq!(registers.put_status(0xf), Effect::None);
    registers.put(at::QUEUE_SELECT, 2, 0);
    registers.put(at::QUEUE_ENABLE, 2, 1);
    assert_eq!(registers.enabled_queues().count(), 1, "too late");
}

#[test]
fn driver_ok_without_features_ok_is_none() {
    let mut registers = registers();
    assert_eq!(registers.put_status(ACKNOWLEDGE_DRIVER | status::DRIVER_OK), Effect::None);
    assert_eq!(registers.status(), ACKNOWLEDGE_DRIVER);
}

#[test]
fn a_reset_of_a_running_device_is_complete_when_the_session_has_stopped() {
    let mut registers = registers();
    registers.run();
    assert_eq!(registers.put_status(0), Effect::Stop);
    assert_ne!(registers.status(), 0);
    assert_eq!(registers.put_status(0), Effect::None, "once is enough");
    registers.put(at::CONFIG_VECTOR, 2, 1);
    assert_eq!(registers.config_vector(), NO_VECTOR, "writes are lost meanwhile");
    registers.stopped();
    assert_eq!(registers.status(), 0);
    assert_eq!(registers.get(at::QUEUE_SELECT, 2), 0);
    assert_eq!((registers.features(), registers.enabled_queues().count()), (0, 0));
    assert_eq!(registers.run(), Effect::Start);
}

#[test]
fn a_device_that_does_not_run_is_reset_at_once() {
    let mut registers = registers();
    registers.negotiate(OFFERED);
    assert_eq!(registers.put_status(0), Effect::Cleared);
    assert_eq!(registers.status(), 0);
    registers.run();
    registers.refuse();
    assert_eq!(registers.status() & status::NEEDS_RESET, status::NEEDS_RESET);
    assert_eq!(registers.put_status(0), Effect::Cleared);
    assert_eq!(registers.status(), 0);
}

#[test]
fn what_runs_and_fails_is_mended_by_a_reset() {
    let mut registers = registers();
    assert!(!registers.fail(), "nothing runs");
    assert_eq!(registers.status(), 0);
    registers.run();
    assert!(registers.fail());
    assert_eq!(registers.status() & status::NEEDS_RESET, status::NEEDS_RESET);
    assert_eq!(registers.put_status(0), Effect::Stop);
    assert!(!registers.fail(), "it is being reset");
    registers.stopped();
    assert_eq!((registers.status(), registers.run()), (0, Effect::Start));
}

#[test]
fn a_vector_that_is_not_there_reads_back_as_none() {
    let mut registers = registers();
    for offset in [at::CONFIG_VECTOR, at::QUEUE_VECTOR] {
        for (written, read) in [(2, 2), (3, 0xffff), (0, 0), (0xffff, 0xffff)] {
            registers.put(offset, 2, written);
            assert_eq!(registers.get(offset, 2), read);
        }
    }
    registers.run();
    assert_eq!(registers.put(at::QUEUE_VECTOR, 2, 2), Effect::None, "no change");
    assert_eq!(registers.put(at::QUEUE_VECTOR, 2, 0), Effect::Vector(1));
}

#[test]
fn a_queue_has_a_size_within_its_bounds_and_its_own_doorbell() {
    let mut registers = registers();
    for (written, read) in [(128, 128), (512, 128), (100, 128), (0, 128), (1, 1), (256, 256)] {
        registers.put(at::QUEUE_SIZE, 2, written);
        assert_eq!(registers.get(at::QUEUE_SIZE, 2), read);
    }
    registers.put(at::QUEUE_SELECT, 2, 1);
    assert_eq!(registers.get(0x1e, 2), 1);
    registers.put(at::QUEUE_SELECT, 2, 2);
    assert_eq!(registers.get(at::QUEUE_SIZE, 2), 0, "no such queue");
    assert_eq!(registers.get(at::QUEUE_VECTOR, 2), 0xffff);
    registers.put(at::QUEUE_ENABLE, 2, 1);
    assert_eq!(registers.enabled_queues().count(), 0);
}

proptest! {
    #[test]
    fn no_writes_panic_or_break_the_invariants(steps in prop::collection::vec(
        (prop_oneof![3 => 0u64..0x40, 1 => any::<u64>()], 0usize..9, any::<u64>(), 0u8..8), 0..300)) {
        let mut registers = registers();
        for (offset, len, value, kind) in steps {
            let before = registers.status();
            let effect = match kind {
                0 => registers.put_status(value as u8),
                1 => { registers.negotiate(OFFERED & value); Effect::None }
                2 => registers.run(),
                3 => { registers.stopped(); Effect::None }
                _ => registers.put(offset, len.min(8), value),
            };
            registers.read(offset, &mut [0; 8][..len.min(8)]);
            if effect == Effect::Start {
                prop_assert!(registers.driver_ok());
            }
            if registers.status() & status::FEATURES_OK != 0 {
                prop_assert_eq!(registers.features() & !OFFERED, 0);
                prop_assert_ne!(registers.features() & features::virtio::VERSION_1, 0);
            }
            if registers.is_stopping() && kind != 3 {
                prop_assert_ne!(registers.status(), 0);
                if effect != Effect::Stop && kind != 2 {
                    prop_assert_eq!(registers.status(), before);
                }
            }
            for (_, queue) in registers.enabled_queues() {
                prop_assert!(queue.size.is_power_of_two() && queue.size <= 256);
                prop_assert!(queue.vector < VECTORS || queue.vector == NO_VECTOR);
            }
        }
    }
}
