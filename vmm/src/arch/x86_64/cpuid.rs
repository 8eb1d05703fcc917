//! What the CPUID instruction tells each vCPU: the host's leaves as KVM supports them, with the topology, the APIC id
//! and the timers of this machine.
//!
//! The topology is one package of `vcpus` cores of one thread each; a vCPU's APIC id is its index.

use std::arch::x86_64::__cpuid;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// The machine's processors, as every vCPU is told of them.
#[derive(Debug, Clone, Copy)]
pub struct Processors {
    /// 1 to 254: an APIC id is the index, and the local APIC's ids end there.
    pub count: u8,
    /// The local APIC's timer takes a TSC deadline (KVM_CAP_TSC_DEADLINE_TIMER).
    pub tsc_deadline_timer: bool,
}

impl Processors {
    /// Bits of an APIC id that number the cores.
    fn core_bits(self) -> u32 {
        u32::from(self.count).next_power_of_two().trailing_zeros()
    }
}

const EDX_HTT: u32 = 1 << 28;
const ECX_PDCM: u32 = 1 << 15;
const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
/// Leaf 6: the APIC timer runs at a constant rate in every power state. Without it Linux looks for a PIT.
const EAX_ARAT: u32 = 1 << 2;
/// Leaf 0x8000_0001: AMD's "cores share a package", and its core performance counters.
const ECX_CMP_LEGACY: u32 = 1 << 1;
const ECX_PERFCTR_CORE: u32 = 1 << 23;
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// A processor cannot have more leaves than this, so one that says it does is not believed.
const SUBLEAVES: u32 = 3;

/// The leaves of vCPU `index`, made from what KVM supports on this host (KVM_GET_SUPPORTED_CPUID).
///
/// The performance counters are left out: without leaf 0xa (and AMD's equivalents) a guest sets none up, and its
/// watchdog does not interrupt it through one.
pub fn for_vcpu(
    supported: &CpuId,
    processors: Processors,
    index: u8,
) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let mut leaves: Vec<_> = supported
        .as_slice()
        .iter()
        .filter(|leaf| !matches!(leaf.function, 0xb | 0x1f))
        .map(|leaf| edited(*leaf, processors, index))
        .collect();
    let highest = supported.as_slice().iter().find(|leaf| leaf.function == 0).map_or(0, |leaf| leaf.eax);
    for function in [0xb, 0x1f] {
        if highest >= function {
            leaves.extend((0..SUBLEAVES).map(|level| topology_leaf(function, level, processors, index)));
        }
    }
    CpuId::from_entries(&leaves)
}

/// Bits of a physical address that this host's CPU has.
pub fn physical_address_bits() -> u8 {
    const ADDRESS_SIZES: u32 = 0x8000_0008;
    /// What every x86-64 CPU has at least.
    const FEWEST: u8 = 36;
    if __cpuid(0x8000_0000).eax < ADDRESS_SIZES { FEWEST } else { __cpuid(ADDRESS_SIZES).eax as u8 }
}

fn edited(mut leaf: kvm_cpuid_entry2, processors: Processors, index: u8) -> kvm_cpuid_entry2 {
    let count = u32::from(processors.count);
    match leaf.function {
        1 => {
            leaf.ebx = leaf.ebx & 0xffff | count << 16 | u32::from(index) << 24;
            leaf.ecx = leaf.ecx & !(ECX_PDCM | ECX_TSC_DEADLINE) | ECX_X2APIC | ECX_HYPERVISOR;
            if processors.tsc_deadline_timer {
                leaf.ecx |= ECX_TSC_DEADLINE;
            }
            leaf.edx = set(leaf.edx, EDX_HTT, count > 1);
        }
        // Intel's caches: the last level is the package's, the others a core's.
        4 if leaf.eax & 0x1f != 0 => {
            let sharing = if leaf.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
            let addressable_cores = (1 << processors.core_bits()) - 1;
            leaf.eax = leaf.eax & 0x3fff | sharing << 14 | addressable_cores << 26;
        }
        6 => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (EAX_ARAT, 0, 0, 0),
        0xa | 0x8000_0022 => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
        0x8000_0001 => {
            leaf.ecx = set(leaf.ecx & !ECX_PERFCTR_CORE, ECX_CMP_LEGACY, count > 1);
        }
        0x8000_0008 => leaf.ecx = leaf.ecx & !0xffff | processors.core_bits() << 12 | (count - 1),
        // AMD's caches, as leaf 4.
        0x8000_001d if leaf.eax & 0x1f != 0 => {
            let sharing = if leaf.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
            leaf.eax = leaf.eax & 0x3fff | sharing << 14;
        }
        // Extended APIC id, core id with one thread a core, one node.
        0x8000_001e => (leaf.eax, leaf.ebx, leaf.ecx) = (index.into(), index.into(), 0),
        _ => {}
    }
    leaf
}

/// Leaves 0xb and 0x1f: threads of a core, cores of the package, and the end.
fn topology_leaf(function: u32, level: u32, processors: Processors, index: u8) -> kvm_cpuid_entry2 {
    let (shift, count, kind) = match level {
        0 => (0, 1, LEVEL_THREAD),
        1 => (processors.core_bits(), processors.count.into(), LEVEL_CORE),
        _ => (0, 0, 0),
    };
    kvm_cpuid_entry2 {
        function,
        index: level,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: kind << 8 | level,
        edx: index.into(),
        ..Default::default()
    }
}

fn set(word: u32, bit: u32, on: bool) -> u32 {
    if on { word | bit } else { word & !bit }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, eax: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ecx, ..Default::default() }
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|leaf| (leaf.function, leaf.index) == (function, index)).unwrap()
    }

    #[test]
    fn every_way_to_ask_for_the_topology_gives_the_same() {
        let host = [leaf(0, 0x1f, 0), leaf(1, 0, 0), leaf(0x8000_0008, 0, 0), leaf(0x8000_001e, 0, 0)];
        let supported = CpuId::from_entries(&host).unwrap();
        for (count, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (64, 6), (254, 8)] {
            let processors = Processors { count, tsc_deadline_timer: true };
            for index in [0, count - 1] {
                let cpuid = for_vcpu(&supported, processors, index).unwrap();
                let basic = find(&cpuid, 1, 0);
                assert_eq!((basic.ebx >> 24, basic.ebx >> 16 & 0xff), (u32::from(index), u32::from(count)));
                assert_ne!(basic.ecx & ECX_TSC_DEADLINE, 0);
                assert_eq!(basic.edx & EDX_HTT != 0, count > 1);
                for function in [0xb, 0x1f] {
                    let cores = find(&cpuid, function, 1);
                    assert_eq!((cores.eax, cores.ebx, cores.edx), (bits, u32::from(count), u32::from(index)));
                }
                let amd = find(&cpuid, 0x8000_0008, 0).ecx;
                assert_eq!((amd & 0xff, amd >> 12), (u32::from(count) - 1, bits));
                assert_eq!(find(&cpuid, 0x8000_001e, 0).eax, u32::from(index));
            }
        }
    }

    #[test]
    fn a_host_without_the_extended_leaves_gets_none() {
        let supported = CpuId::from_entries(&[leaf(0, 0xd, 0)]).unwrap();
        let processors = Processors { count: 2, tsc_deadline_timer: false };
        let cpuid = for_vcpu(&supported, processors, 0).unwrap();
        assert!(cpuid.as_slice().iter().any(|leaf| leaf.function == 0xb));
        assert!(!cpuid.as_slice().iter().any(|leaf| leaf.function == 0x1f));
    }
}
