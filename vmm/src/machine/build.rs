//! From a plan to a machine that can run: KVM, memory, daemons, buses, vCPUs, in the order in which they can be
//! refused.

use std::sync::Arc;

use super::buses::Buses;
use super::connect::{check_sockets, connect_all, start_daemons};
use super::event::{Event, EventQueue, EventSender, SlotIndex};
use super::firmware;
use super::health::HealthTable;
use super::operate::Operator;
use super::ram;
use super::signals::Signals;
use super::terminal_link::TerminalLink;
use super::{Machine, Phase};
use crate::arch::x86_64::{cpuid, msr};
use crate::bus;
use crate::config::{ControlAddress, MachineConfig, UartConfig};
use crate::control::{Control, ControlSocket};
use crate::kvm::irq::{Gsi, Routes};
use crate::kvm::vcpu::{VcpuConfig, VcpuHandle};
use crate::kvm::{Kvm, Vm};
use crate::legacy::line::Line;
use crate::legacy::power::{self, KeyboardReset, PowerPorts};
use crate::legacy::uart::{self, Uart};
use crate::pci::Root;
use crate::plan::{self, Backend, MachinePlan, Terminal};
use crate::sandbox;
use crate::vhost::{MemoryTable, Negotiated};
use crate::virtio::{Device, Parts};
use cleave_common::exit::Failure;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors in a queue, unless its driver asks for fewer.
const QUEUE_SIZE: u16 = 256;

/// Builds the machine that `config` asks for. `None` if somebody asked to stop before it could run.
pub fn build(config: &MachineConfig) -> Result<Option<Machine>, Failure> {
    let mut plan = plan::plan(config, cpuid::physical_address_bits()).map_err(Failure::usage)?;
    check_sockets(&plan.slots)?;
    let boot = firmware::prepare(config, &plan)?;
    raise_file_limit();
    let queue = EventQueue::new().map_err(Failure::host)?;
    let mut signals = Signals::catch().map_err(Failure::host)?;
    let line = Line::open(&config.uart, queue.wake()).map_err(Failure::usage)?;
    let terminal = link_terminal(&mut plan, &queue)?;

    let sockets = control_sockets(config)?;

    let kvm = Kvm::open().map_err(Failure::host)?;
    let Some(ram) = ram::take(&config.memory, &plan.ram, &mut signals)? else { return Ok(None) };
    let vm = Vm::new(&kvm, Arc::new(ram)).map_err(Failure::host)?;

    let mut health = HealthTable::new(&plan.slots);
    let (mut daemons, targets) = start_daemons(&plan.slots, &mut health)?;
    let sessions = connect_all(targets, &plan.slots, &mut daemons, &mut health, &queue, &mut signals)?;
    let Some(sessions) = sessions else { return Ok(None) };

    let buses = Buses::new();
    let routes = Arc::new(Routes::new(vm.clone()).map_err(Failure::host)?);
    let (root, devices) = build_pci(&plan, &vm, &routes, sessions, &buses, &queue.sender())?;
    let uart = build_uart(config, &routes, &buses, &line, &queue)?;
    let power_button = add_power(&routes, &buses, &queue.sender())?;
    let vcpus = build_vcpus(config.cpus, &kvm, &vm, Arc::new(buses), &queue.sender())?;
    let control = start_control(sockets, &queue.sender())?;
    Ok(Some(Machine {
        operator: Operator::new(control, config.name.clone()),
        phase: Phase::Running,
        queue,
        signals,
        terminating: false,
        vm,
        vcpus,
        root,
        devices,
        health,
        uart,
        line,
        terminal,
        power_button,
        boot,
        daemons,
    }))
}

fn control_sockets(config: &MachineConfig) -> Result<Vec<ControlSocket>, Failure> {
    let open = |address: &ControlAddress| match address {
        ControlAddress::Unix(path) => ControlSocket::unix(path),
        ControlAddress::Tcp(address) => ControlSocket::tcp(*address),
    };
    config.qmp.iter().map(open).collect::<Result<_, _>>().map_err(Failure::host)
}

fn start_control(sockets: Vec<ControlSocket>, events: &EventSender) -> Result<Option<Control>, Failure> {
    if sockets.is_empty() {
        return Ok(None);
    }
    let events = events.clone();
    let confine = || sandbox::confine_thread(sandbox::Thread::Control);
    let control = Control::start(sockets, confine, move |asked| events.send(Event::Asked(asked)));
    control.map(Some).map_err(Failure::host)
}

/// Connects the daemon that wants the machine's terminal with it.
fn link_terminal(plan: &mut MachinePlan, queue: &EventQueue) -> Result<Option<TerminalLink>, Failure> {
    for slot in &mut plan.slots {
        if let Backend::Spawn(spec) = &mut slot.backend
            && spec.terminal == Terminal::Wanted
        {
            let link = TerminalLink::open(queue.wake()).map_err(Failure::usage)?;
            spec.terminal = Terminal::Given(link.end_for_daemon());
            return Ok(Some(link));
        }
    }
    Ok(None)
}

/// A device has two descriptors a queue and a few more: the soft limit of a login session is soon too low.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    if let Err(error) = raised {
        tracing::debug!("the limit of open files stays at {:?}: {error}", limit.current);
    }
}

fn build_pci(
    plan: &MachinePlan,
    vm: &Vm,
    routes: &Arc<Routes>,
    sessions: Vec<Negotiated>,
    buses: &Buses,
    events: &EventSender,
) -> Result<(Arc<Root>, Vec<Arc<Device>>), Failure> {
    let memory = Arc::new(MemoryTable::of(vm.ram()).map_err(Failure::host)?);
    let root = Root::new(&buses.mmio, plan.mmio64.base, plan.mmio64.size);
    let mut devices = Vec::new();
    for (at, (slot, session)) in plan.slots.iter().zip(sessions).enumerate() {
        let events = events.clone();
        let parts = Parts {
            name: slot.name.clone(),
            device_type: slot.device_type,
            queue_size: QUEUE_SIZE,
            memory: Arc::clone(&memory),
            interrupts: Arc::clone(routes) as _,
            doorbells: Arc::new(vm.clone()),
            events: Arc::new(move |event| events.send(Event::Device { slot: SlotIndex(at), event })),
        };
        let device = Device::new(parts, session).map_err(Failure::host)?;
        root.add(slot.device_number, Arc::clone(&device) as _).map_err(Failure::internal)?;
        devices.push(device);
    }
    root.attach(&buses.pio, &buses.mmio, plan::ECAM.base).map_err(Failure::internal)?;
    Ok((root, devices))
}

fn build_uart(
    config: &MachineConfig,
    routes: &Routes,
    buses: &Buses,
    line: &Line,
    queue: &EventQueue,
) -> Result<Arc<Uart>, Failure> {
    let interrupt = Arc::new(bus::Event::new().map_err(Failure::host)?);
    let uart = Arc::new(Uart::new(Arc::clone(&interrupt), line.output(), Arc::clone(queue.wake())));
    if config.uart != UartConfig::Off {
        routes.irqfd(Gsi(uart::IRQ), interrupt.eventfd()).map_err(Failure::host)?;
        let ports = Arc::clone(&uart) as _;
        buses.pio.insert(uart::PORT.into(), uart::PORTS.into(), ports).map_err(Failure::internal)?;
    }
    Ok(uart)
}

/// Puts the power and reset ports on the bus; the event presses the power button.
fn add_power(routes: &Routes, buses: &Buses, events: &EventSender) -> Result<Arc<bus::Event>, Failure> {
    let ask = |events: EventSender| move |request| events.send_power(request);
    let ports = Arc::new(PowerPorts(ask(events.clone())));
    buses
        .pio
        .insert(power::SLEEP_CONTROL_PORT.into(), power::PORTS.into(), ports)
        .map_err(Failure::internal)?;
    let keyboard = Arc::new(KeyboardReset(ask(events.clone())));
    buses.pio.insert(power::KEYBOARD_COMMAND_PORT.into(), 1, keyboard).map_err(Failure::internal)?;
    let button = Arc::new(bus::Event::new().map_err(Failure::host)?);
    routes.irqfd(Gsi(plan::POWER_BUTTON_GSI), button.eventfd()).map_err(Failure::host)?;
    Ok(button)
}

fn build_vcpus(
    count: u8,
    kvm: &Kvm,
    vm: &Vm,
    buses: Arc<Buses>,
    events: &EventSender,
) -> Result<Vec<VcpuHandle>, Failure> {
    let supported = kvm.supported_cpuid().map_err(Failure::host)?;
    let processors = cpuid::Processors { count, tsc_deadline_timer: kvm.tsc_deadline_timer() };
    let spawn = |index: u8| {
        let cpuid = cpuid::for_vcpu(&supported, processors, index).map_err(Failure::host)?;
        let config = VcpuConfig { cpuid, msrs: msr::initial() };
        let events = events.clone();
        let sink = Arc::new(move |index, event| events.send(Event::Vcpu { index, event }));
        VcpuHandle::spawn(vm, index.into(), &config, Arc::clone(&buses), sink).map_err(Failure::host)
    };
    (0..count).map(spawn).collect()
}
