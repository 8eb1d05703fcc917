//! Guests of a few real-mode instructions, which even a software KVM runs.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::vcpu::{EntryState, ExitHandler, VcpuConfig, VcpuEvent, VcpuHandle};
use super::*;
use crate::memory::{GuestRam, RamOptions, RamRegion};

const CODE: u64 = 0x1000;
const PATIENCE: Duration = Duration::from_secs(10);

// Ports from 0x50 on: those of the PICs are KVM's own.

/// Says what the guest does, and answers reads from a list.
struct Ports {
    news: Mutex<Sender<News>>,
    answers: Mutex<VecDeque<u8>>,
}

#[derive(Debug)]
enum News {
    Wrote(u16, Vec<u8>),
    Event(VcpuEvent),
}

impl ExitHandler for Ports {
    fn pio_read(&self, _port: u16, data: &mut [u8]) {
        data.fill_with(|| self.answers.lock().unwrap().pop_front().unwrap_or(0));
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        self.news.lock().unwrap().send(News::Wrote(port, data.to_vec())).unwrap();
    }

    fn mmio_read(&self, _address: u64, _data: &mut [u8]) {}

    fn mmio_write(&self, _address: u64, _data: &[u8]) {}
}

struct Guest {
    vm: Vm,
    vcpu: VcpuHandle,
    news: Receiver<News>,
}

impl Guest {
    fn new(code: &[u8], answers: &[u8]) -> Self {
        let kvm = Kvm::open().unwrap();
        let ram =
            GuestRam::new(&RamOptions::default(), &[RamRegion { gpa: 0, size: 1 << 20, file_offset: 0 }])
                .unwrap();
        ram.memory().write_slice(code, GuestAddress(CODE)).unwrap();
        let vm = Vm::new(&kvm, Arc::new(ram)).unwrap();
        let (sender, news) = channel();
        let events = Mutex::new(sender.clone());
        let ports =
            Ports { news: Mutex::new(sender), answers: Mutex::new(answers.iter().copied().collect()) };
        let config = VcpuConfig { cpuid: kvm.supported_cpuid().unwrap(), msrs: Vec::new() };
        let sink = Arc::new(move |_, event| drop(events.lock().unwrap().send(News::Event(event))));
        let vcpu = VcpuHandle::spawn(&vm, 0, &config, Arc::new(ports), sink).unwrap();
        vcpu.reset(Some(real_mode()));
        Self { vm, vcpu, news }
    }

    fn next(&self) -> News {
        self.news.recv_timeout(PATIENCE).unwrap()
    }

    fn wrote(&self) -> (u16, Vec<u8>) {
        match self.next() {
            News::Wrote(port, data) => (port, data),
            News::Event(event) => panic!("{event}"),
        }
    }

    /// Skips what the guest wrote meanwhile.
    fn event(&self) -> VcpuEvent {
        loop {
            if let News::Event(event) = self.next() {
                return event;
            }
        }
    }
}

fn real_mode() -> EntryState {
    let data = kvm_segment { limit: 0xffff, type_: 3, present: 1, s: 1, ..Default::default() };
    let code = kvm_segment { type_: 0xb, ..data };
    let system = kvm_segment { s: 0, ..data };
    let sregs = kvm_sregs {
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: kvm_segment { type_: 0xb, ..system },
        ldt: kvm_segment { type_: 2, ..system },
        gdt: kvm_dtable { limit: 0xffff, ..Default::default() },
        idt: kvm_dtable { limit: 0xffff, ..Default::default() },
        cr0: 0x10,
        ..Default::default()
    };
    let regs = kvm_regs { rip: CODE, rsp: 0x8000, rflags: 2, ..Default::default() };
    EntryState { regs, sregs }
}

/// 32 bits, flat, without any interrupt descriptor.
fn protected_mode() -> EntryState {
    let mut entry = real_mode();
    for segment in [
        &mut entry.sregs.cs,
        &mut entry.sregs.ds,
        &mut entry.sregs.es,
        &mut entry.sregs.fs,
        &mut entry.sregs.gs,
        &mut entry.sregs.ss,
    ] {
        *segment = kvm_segment { limit: 0xffff_ffff, g: 1, db: 1, selector: 8, ..*segment };
    }
    entry.sregs.idt.limit = 0;
    entry.sregs.cr0 = 0x11;
    entry
}

#[test]
#[cfg_attr(no_kvm, ignore = "there is no /dev/kvm that can be opened")]
fn port_accesses_reach_the_handler_one_element_at_a_time() {
    // mov si, 0x1000; mov dx, 0x52; mov cx, 2; cld; rep outsw; in al, 0x50; inc al; out 0x51, al; hlt
    let code = [
        0xbe, 0x00, 0x10, 0xba, 0x52, 0x00, 0xb9, 2, 0, 0xfc, 0xf3, 0x6f, 0xe4, 0x50, 0xfe, 0xc0, 0xe6, 0x51,
        0xf4,
    ];
    let guest = Guest::new(&code, &[0x41]);
    guest.vcpu.run();
    assert_eq!(guest.wrote(), (0x52, vec![0xbe, 0x00]));
    assert_eq!(guest.wrote(), (0x52, vec![0x10, 0xba]));
    assert_eq!(guest.wrote(), (0x51, vec![0x42]));
}

#[test]
#[cfg_attr(no_kvm, ignore = "there is no /dev/kvm that can be opened")]
fn no_park_is_lost_wherever_the_guest_is() {
    let endless = [0xeb, 0xfe];
    let halted = [0xf4, 0xeb, 0xfd];
    let busy_with_exits = [0xe6, 0x51, 0xeb, 0xfc];
    for code in [&endless[..], &halted, &busy_with_exits] {
        let guest = Guest::new(code, &[]);
        for _ in 0..200 {
            guest.vcpu.run();
            guest.vcpu.park();
            assert!(matches!(guest.event(), VcpuEvent::Parked));
        }
    }
}

#[test]
#[cfg_attr(no_kvm, ignore = "there is no /dev/kvm that can be opened")]
fn a_parked_guest_stands_still_and_goes_on_where_it_was() {
    // again: inc ax; out 0x51, ax; jmp again
    let guest = Guest::new(&[0x40, 0xe7, 0x51, 0xeb, 0xfb], &[]);
    guest.vcpu.run();
    let mut last = 0;
    for _ in 0..20 {
        let (_, data) = guest.wrote();
        last = u16::from_le_bytes(data.try_into().unwrap());
    }
    guest.vcpu.park();
    loop {
        match guest.next() {
            News::Wrote(_, data) => last = u16::from_le_bytes(data.try_into().unwrap()),
            News::Event(event) => break assert!(matches!(event, VcpuEvent::Parked)),
        }
    }
    assert!(guest.news.recv_timeout(Duration::from_millis(50)).is_err());
    guest.vcpu.run();
    assert_eq!(guest.wrote().1, (last + 1).to_le_bytes());
}

#[test]
#[cfg_attr(no_kvm, ignore = "there is no /dev/kvm that can be opened")]
fn a_reset_starts_over_and_a_handle_that_is_dropped_ends_the_thread() {
    // inc bx; mov ax, bx; out 0x51, ax; jmp to itself
    let guest = Guest::new(&[0x43, 0x89, 0xd8, 0xe7, 0x51, 0xeb, 0xfe], &[]);
    for _ in 0..5 {
        guest.vcpu.run();
        assert_eq!(guest.wrote().1, [1, 0]);
        guest.vcpu.park();
        assert!(matches!(guest.event(), VcpuEvent::Parked));
        guest.vm.reset_irqchips().unwrap();
        guest.vcpu.reset(Some(real_mode()));
    }
    guest.vcpu.run();
    assert_eq!(guest.wrote().1, [1, 0]);
    drop(guest.vcpu);
    assert!(guest.news.recv_timeout(PATIENCE).is_err(), "its sender is gone");
}

#[test]
#[cfg_attr(no_kvm, ignore = "there is no /dev/kvm that can be opened")]
fn a_triple_fault_is_told_and_can_be_reset() {
    // ud2, with no interrupt table to take it
    let guest = Guest::new(&[0x0f, 0x0b], &[]);
    guest.vcpu.reset(Some(protected_mode()));
    for _ in 0..2 {
        guest.vcpu.run();
        let event = guest.event();
        assert!(matches!(event, VcpuEvent::TripleFault { .. }), "{event}");
        assert!(event.to_string().contains("rip "), "{event}");
        guest.vcpu.park();
        assert!(matches!(guest.event(), VcpuEvent::Parked));
        guest.vcpu.reset(Some(protected_mode()));
    }
}

#[test]
#[cfg_attr(no_kvm, ignore = "there is no /dev/kvm that can be opened")]
fn an_ioeventfd_takes_writes_of_every_width_off_the_bus() {
    // out 0x52, al; out 0x52, ax; out 0x52, eax; out 0x51, al; hlt
    let guest = Guest::new(&[0xe6, 0x52, 0xe7, 0x52, 0x66, 0xe7, 0x52, 0xe6, 0x51, 0xf4], &[]);
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    guest.vm.ioeventfd(IoEventAddress::Pio(0x52), &event).unwrap();
    guest.vcpu.run();
    assert_eq!(guest.wrote().0, 0x51);
    assert_eq!(event.read().unwrap(), 3);

    guest.vm.remove_ioeventfd(IoEventAddress::Pio(0x52), &event).unwrap();
    guest.vcpu.park();
    assert!(matches!(guest.event(), VcpuEvent::Parked));
    guest.vcpu.reset(Some(real_mode()));
    guest.vcpu.run();
    let ports: Vec<_> = (0..4).map(|_| guest.wrote().0).collect();
    assert_eq!(ports, [0x52, 0x52, 0x52, 0x51]);
}

#[test]
#[cfg_attr(no_kvm, ignore = "there is no /dev/kvm that can be opened")]
fn a_reset_meets_no_half_done_access() {
    // out 0x51, al; mov ax, 0xffff; mov ds, ax; then for ever: mov [0x20], al, which is beyond RAM
    let code = [0xe6, 0x51, 0xb8, 0xff, 0xff, 0x8e, 0xd8, 0xa2, 0x20, 0x00, 0xeb, 0xfb];
    let guest = Guest::new(&code, &[]);
    for _ in 0..200 {
        guest.vcpu.run();
        assert_eq!(guest.wrote().0, 0x51);
        guest.vcpu.park();
        assert!(matches!(guest.event(), VcpuEvent::Parked));
        guest.vcpu.reset(Some(real_mode()));
    }
}
