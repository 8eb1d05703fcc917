use proptest::prelude::*;

use super::super::fake::Host;
use super::*;

const ENABLED: u16 = CONTROL_ENABLE;
const ALL_MASKED: u16 = CONTROL_ENABLE | CONTROL_FUNCTION_MASK;

fn msix(count: u16) -> (MsiX, Arc<Host>) {
    let host = Arc::new(Host::default());
    (MsiX::new(count, host.clone()).unwrap(), host)
}

/// Programs a vector as Linux does: address, data, then the mask.
fn program(msix: &MsiX, vector: u64, message: MsiMessage, masked: u32) {
    let at = vector * ENTRY_LEN;
    msix.write_table(at, &(message.address as u32).to_le_bytes());
    msix.write_table(at + 4, &((message.address >> 32) as u32).to_le_bytes());
    msix.write_table(at + 8, &message.data.to_le_bytes());
    msix.write_table(at + 12, &masked.to_le_bytes());
}

fn pending(msix: &MsiX) -> u64 {
    let mut bits = [0; 8];
    msix.read_pending(0, &mut bits);
    u64::from_le_bytes(bits)
}

const MESSAGE: MsiMessage = MsiMessage { address: 0xfee0_1000, data: 0x4021 };

#[test]
fn a_vector_is_an_irqfd_exactly_while_nothing_masks_it() {
    let (msix, host) = msix(3);
    let live = || host.attached.lock().unwrap().len();
    program(&msix, 1, MESSAGE, 0);
    assert_eq!(live(), 0, "MSI-X is off");
    msix.set_control(ALL_MASKED);
    assert_eq!(live(), 0, "the function is masked");
    msix.set_control(ENABLED);
    assert_eq!(*host.attached.lock().unwrap(), [Gsi(25)].into());
    assert_eq!(host.routes.lock().unwrap()[&Gsi(25)], MESSAGE);
    msix.write_table(ENTRY_LEN + 12, &1u32.to_le_bytes());
    assert_eq!(live(), 0, "the vector is masked");
    msix.write_table(ENTRY_LEN + 12, &0u32.to_le_bytes());
    assert_eq!(live(), 1);
    msix.set_control(0);
    assert_eq!(live(), 0);
}

#[test]
fn what_comes_while_masked_is_pending_and_is_kept() {
    let (msix, host) = msix(10);
    msix.set_control(ENABLED);
    for vector in [0, 9] {
        msix.event(vector).unwrap().signal();
    }
    assert_eq!(pending(&msix), 1 | 1 << 9);
    assert_eq!(pending(&msix), 1 | 1 << 9, "reading takes nothing");
    program(&msix, 9, MESSAGE, 0);
    assert_eq!(pending(&msix), 1, "a live vector has nothing pending");
    assert!(msix.event(9).unwrap().is_signalled(), "the event still carries it to KVM");
    assert_eq!(host.attached.lock().unwrap().len(), 1);
    msix.reset();
    assert_eq!(pending(&msix), 0);
    assert!(host.attached.lock().unwrap().is_empty());
}

#[test]
fn what_is_pending_can_be_forgotten_but_not_what_is_on_its_way() {
    let (msix, _host) = msix(2);
    msix.set_control(ENABLED);
    program(&msix, 1, MESSAGE, 0);
    for vector in [0, 1] {
        msix.event(vector).unwrap().signal();
    }
    msix.forget_pending();
    assert_eq!(pending(&msix), 0);
    assert!(msix.event(1).unwrap().is_signalled(), "the event of a live vector is KVM's");
}

#[test]
fn a_new_message_on_a_live_vector_is_routed() {
    let (msix, host) = msix(1);
    msix.set_control(ENABLED);
    program(&msix, 0, MESSAGE, 0);
    msix.write_table(8, &7u32.to_le_bytes());
    assert_eq!(host.routes.lock().unwrap()[&Gsi(24)], MsiMessage { data: 7, ..MESSAGE });
}

#[test]
fn the_table_reads_as_written_and_starts_masked() {
    let (msix, _host) = msix(2);
    let mut entry = [0xaa; 16];
    msix.read_table(16, &mut entry);
    assert_eq!(u128::from_le_bytes(entry), 1 << 96);
    msix.write_table(16, &0xfee0_0003u64.to_le_bytes());
    msix.write_table(24, &(1u64 << 32 | 0x55).to_le_bytes());
    msix.read_table(16, &mut entry);
    assert_eq!(u128::from_le_bytes(entry), 1 << 96 | 0x55 << 64 | 0xfee0_0000);
    let mut beyond = [0xaa; 8];
    msix.read_table(32, &mut beyond);
    assert_eq!(beyond, [0; 8]);
}

#[test]
fn the_capability_says_where_table_and_pending_bits_are() {
    assert_eq!(capability(5, 2, 0x4000, 0x6000), [4, 0, 2, 0x40, 0, 0, 2, 0x60, 0, 0]);
}

proptest! {
    /// The fake host asserts that nothing is attached twice or without a route.
    #[test]
    fn no_writes_break_the_invariants(steps in prop::collection::vec(
        (any::<u8>(), 0u64..100, any::<u64>(), any::<u16>()), 0..200)) {
        let (msix, host) = msix(4);
        let mut control = 0;
        for (step, offset, value, word) in steps {
            match step % 6 {
                0 => { control = word & CONTROL_WRITABLE; msix.set_control(control) }
                1 => msix.write_table(offset, &value.to_le_bytes()),
                2 | 3 => msix.write_table(offset & !3, &(value as u32).to_le_bytes()),
                4 => { if let Some(event) = msix.event(word) { event.signal() } }
                _ => {
                    let mut data = [0; 8];
                    msix.read_table(value, &mut data);
                    msix.read_pending(value, &mut data);
                }
            }
            let attached = host.attached.lock().unwrap().len();
            if control & ALL_MASKED != ENABLED {
                prop_assert_eq!(attached, 0);
            }
        }
    }
}
