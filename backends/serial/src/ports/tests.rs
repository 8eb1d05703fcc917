use super::message::{Event, NotAMessage};
use super::*;

fn named(name: &str) -> Nature {
    Nature { name: Some(name.to_owned()), is_console: false }
}

const CONSOLE: Nature = Nature { name: None, is_console: true };

fn all(ports: &mut Ports) -> Vec<Message> {
    std::iter::from_fn(|| ports.next_message()).take(100).collect()
}

/// A console, a named port, and a driver that has taken both.
fn two() -> Ports {
    let mut ports = Ports::new(4);
    assert_eq!(ports.add(named("a.b")), Ok(1), "0 is a console's");
    assert_eq!(ports.add(CONSOLE), Ok(0));
    assert!(all(&mut ports).is_empty(), "there is no driver");
    ports.hear(Told::DeviceReady(true));
    assert_eq!(all(&mut ports), [Message::Add(0), Message::Add(1)]);
    ports.hear(Told::PortReady(0, true));
    ports.hear(Told::PortReady(1, true));
    assert_eq!(all(&mut ports), [Message::Console(0), Message::Name(1, "a.b".to_owned())]);
    ports
}

#[test]
fn a_driver_learns_of_the_ports_one_step_after_the_other() {
    let mut ports = two();
    assert!(!ports.is_guest_open(1) && ports.hear(Told::PortOpen(1, true)) && ports.is_guest_open(1));
    ports.set_host_open(1, true);
    assert_eq!(all(&mut ports), [Message::Open(1, true)]);
    let size = Size { columns: 132, rows: 43 };
    ports.set_size(0, size);
    ports.set_size(1, size);
    assert_eq!(all(&mut ports), [Message::Resize(0, size)], "only a console has a size");
    ports.set_size(0, size);
    assert!(all(&mut ports).is_empty());
}

#[test]
fn a_client_that_went_and_came_again_is_told_as_that() {
    let mut ports = two();
    ports.set_host_open(1, true);
    assert_eq!(all(&mut ports), [Message::Open(1, true)]);
    ports.set_host_open(1, false);
    ports.set_host_open(1, true);
    assert_eq!(all(&mut ports), [Message::Open(1, false), Message::Open(1, true)]);
    ports.set_host_open(1, false);
    assert_eq!(all(&mut ports), [Message::Open(1, false)]);
    // Nobody was told of this one.
    ports.set_host_open(1, true);
    ports.set_host_open(1, false);
    assert!(all(&mut ports).is_empty());
}

#[test]
fn ports_come_and_go_while_there_is_a_driver() {
    let mut ports = two();
    assert_eq!(ports.add(named("a.b")), Err(NoPlace::Name("a.b".to_owned())));
    assert_eq!(ports.add(named("c")), Ok(2));
    assert_eq!(ports.add(Nature { name: None, is_console: true }), Ok(3));
    assert_eq!(ports.add(named("d")), Err(NoPlace::Full(4)));
    assert_eq!(all(&mut ports), [Message::Add(2), Message::Add(3)]);
    ports.remove(2);
    assert_eq!(ports.add(named("d")), Err(NoPlace::Full(4)), "the driver has it still");
    assert_eq!(all(&mut ports), [Message::Remove(2)]);
    assert_eq!(ports.add(named("d")), Ok(2));
    assert_eq!(all(&mut ports), [Message::Add(2)]);
    // Removed before its driver has taken it, and one that no driver knew.
    ports.remove(2);
    assert_eq!(all(&mut ports), [Message::Remove(2)]);
    ports.reset();
    ports.remove(3);
    assert!(all(&mut ports).is_empty());
}

#[test]
fn without_a_console_port_0_is_the_last_to_be_given() {
    let mut ports = Ports::new(3);
    let given: Vec<_> = ["a", "b", "c"].map(|name| ports.add(named(name)).unwrap()).into();
    assert_eq!(given, [1, 2, 0]);
}

#[test]
fn a_successor_goes_on_and_repeats_nothing_but_the_size() {
    let mut ports = two();
    ports.set_host_open(1, true);
    ports.set_size(0, Size { columns: 80, rows: 25 });
    ports.hear(Told::PortOpen(1, true));
    all(&mut ports);
    let mut successor = Ports::new(4);
    successor.add(CONSOLE).unwrap();
    successor.add(named("a.b")).unwrap();
    successor.restore(ports.bits().collect::<Vec<_>>());
    assert!(successor.is_guest_open(1) && successor.is_told_open(1));
    successor.set_host_open(1, true);
    successor.set_size(0, Size { columns: 100, rows: 30 });
    assert_eq!(all(&mut successor), [Message::Resize(0, Size { columns: 100, rows: 30 })]);
    // One that has other ports.
    let mut other = Ports::new(2);
    other.restore(ports.bits().take(2).chain([1]).collect::<Vec<_>>());
    assert_eq!(all(&mut other), [Message::Remove(0), Message::Remove(1)]);
}

#[test]
fn whatever_a_driver_says_in_whatever_order_changes_a_few_flags() {
    let mut ports = two();
    let mut state = 0x1234_5678_9abc_def1_u64;
    for _ in 0..20_000 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let message = state.to_le_bytes();
        let id = u32::from(message[0] % 6);
        let bytes =
            [&id.to_le_bytes()[..], &[message[1] % 9, 0], &u16::from(message[2] % 2).to_le_bytes()].concat();
        if let Ok(told) = Told::decode(&bytes) {
            let known = ports.hear(told);
            assert!(known || id >= 2 || !matches!(told, Told::DeviceReady(_)));
        }
        assert!(all(&mut ports).len() < 20, "what there is to say is bounded");
    }
    ports.hear(Told::DeviceReady(true));
    assert_eq!(all(&mut ports), [Message::Add(0), Message::Add(1)]);
}

#[test]
fn messages_have_the_layout_of_the_specification() {
    let name = Message::Name(2, "ab".to_owned()).encode(SizeOrder::Spec);
    assert_eq!(name, [2, 0, 0, 0, 7, 0, 1, 0, b'a', b'b', 0]);
    let size = Message::Resize(1, Size { columns: 0x102, rows: 3 });
    assert_eq!(size.encode(SizeOrder::Spec), [1, 0, 0, 0, 5, 0, 1, 0, 2, 1, 3, 0]);
    assert_eq!(size.encode(SizeOrder::Linux)[8..], [3, 0, 2, 1]);
    assert_eq!(Message::Open(3, false).encode(SizeOrder::Spec), [3, 0, 0, 0, 6, 0, 0, 0]);
    assert_eq!(Told::decode(&[1, 0, 0, 0, 6, 0, 1, 0, 9, 9]), Ok(Told::PortOpen(1, true)));
    assert_eq!(Told::decode(&[0; 7]), Err(NotAMessage::Short(7)));
    assert_eq!(Told::decode(&[0, 0, 0, 0, Event::Resize as u8, 0, 0, 0]), Err(NotAMessage::Event(5)));
}
