use cleave_common::options;
use proptest::prelude::*;

use super::*;

fn throttle(text: &str) -> Throttle {
    let config: ThrottleConfig = options::parse(text, None).unwrap();
    config.validate().unwrap();
    Throttle::new(&config).unwrap()
}

const MS: Duration = Duration::from_millis(1);

/// Lets requests of `bytes` go as fast as they may until `end`; how many went, and when the last one did.
fn run(throttle: &mut Throttle, now: &mut Duration, end: Duration, direction: Direction, bytes: u64) -> u64 {
    let mut went = 0;
    loop {
        match throttle.ask(*now, 0, direction, bytes) {
            Turn::Go { next } => {
                assert_eq!(next, None);
                went += 1;
            }
            Turn::After(wait) if *now + wait <= end => *now += wait,
            Turn::After(_) => {
                throttle.leave(0, direction);
                *now = end;
                return went;
            }
            Turn::InLine => panic!("nobody else is in line"),
        }
    }
}

#[test]
fn nothing_limited_is_no_throttle() {
    assert!(Throttle::new(&ThrottleConfig::default()).is_none());
}

#[test]
fn the_rate_is_exact_after_a_tenth_of_a_second_of_burst() {
    let mut throttle = throttle("iops-total=1000");
    let mut now = Duration::ZERO;
    // A tenth of a second's worth, and the one that makes it more.
    assert_eq!(run(&mut throttle, &mut now, Duration::ZERO, Direction::Read, 4096), 101);
    assert_eq!(throttle.ask(now, 0, Direction::Write, 512), Turn::After(MS));
    throttle.leave(0, Direction::Write);
    for second in 1..=10 {
        let end = Duration::from_secs(second);
        assert_eq!(run(&mut throttle, &mut now, end, Direction::Write, 1 << 20), 1000);
    }
    // What is not used is not saved up.
    now += Duration::from_secs(3600);
    let end = now;
    assert_eq!(run(&mut throttle, &mut now, end, Direction::Read, 4096), 101);
}

#[test]
fn bytes_are_limited_whatever_the_requests() {
    for bytes in [512, 4096, 1 << 20] {
        let mut throttle = throttle("bps-write=10485760");
        let mut now = Duration::ZERO;
        run(&mut throttle, &mut now, Duration::from_secs(1), Direction::Write, bytes);
        let went = run(&mut throttle, &mut now, Duration::from_secs(11), Direction::Write, bytes);
        assert_eq!(went * bytes, 100 << 20);
        assert_eq!(throttle.ask(now, 0, Direction::Read, 1 << 30), Turn::Go { next: None }, "reads are free");
    }
}

#[test]
fn directions_have_limits_of_their_own() {
    let mut throttle = throttle("iops-read=10,iops-write=1000");
    let mut now = Duration::ZERO;
    run(&mut throttle, &mut now, Duration::ZERO, Direction::Read, 512);
    assert_eq!(throttle.ask(now, 0, Direction::Read, 512), Turn::After(100 * MS));
    assert_eq!(throttle.ask(now, 0, Direction::Write, 512), Turn::Go { next: None });
}

#[test]
fn a_burst_lasts_as_long_as_it_may() {
    let mut throttle = throttle("iops-total=100,iops-total-max=1000,iops-total-max-length=5");
    let mut now = Duration::ZERO;
    let per_second: Vec<u64> = (1..=10)
        .map(|s| run(&mut throttle, &mut now, Duration::from_secs(s), Direction::Read, 4096))
        .collect();
    // The first second has the burst bucket's tenth on top. 5000 and what leaks meanwhile pass at the burst's rate.
    assert_eq!(per_second[..5], [1101, 1000, 1000, 1000, 1000]);
    assert_eq!(per_second.iter().sum::<u64>(), 5000 + 10 * 100 + 1);
    assert_eq!(per_second[7..], [100, 100, 100]);
}

#[test]
fn a_burst_of_one_second_needs_no_second_bucket() {
    let mut throttle = throttle("bps-total=1M,bps-total-max=8M");
    let mut now = Duration::ZERO;
    assert_eq!(run(&mut throttle, &mut now, Duration::ZERO, Direction::Read, 1 << 20), 9);
    assert_eq!(throttle.ask(now, 0, Direction::Read, 1), Turn::After(Duration::from_secs(1)));
}

#[test]
fn large_requests_count_as_several() {
    let mut throttle = throttle("iops-total=10,iops-size=4k");
    let mut now = Duration::ZERO;
    assert_eq!(throttle.ask(now, 0, Direction::Read, 4096), Turn::Go { next: None });
    assert_eq!(throttle.ask(now, 0, Direction::Read, 40960), Turn::Go { next: None });
    assert_eq!(throttle.ask(now, 0, Direction::Read, 512), Turn::After(Duration::from_secs(1)));
    now += Duration::from_secs(1);
    assert_eq!(throttle.ask(now, 0, Direction::Read, 6144), Turn::Go { next: None });
    assert_eq!(throttle.ask(now, 0, Direction::Read, 512), Turn::After(150 * MS));
}

#[test]
fn queues_take_turns_in_the_order_they_came() {
    let mut throttle = throttle("iops-write=10");
    let now = Duration::ZERO;
    let ask =
        |throttle: &mut Throttle, ms: u32, queue| throttle.ask(now + MS * ms, queue, Direction::Write, 512);
    assert_eq!(ask(&mut throttle, 0, 0), Turn::Go { next: None });
    assert_eq!(ask(&mut throttle, 0, 0), Turn::Go { next: None });
    assert_eq!(ask(&mut throttle, 0, 0), Turn::After(100 * MS));
    for queue in [2, 1, 2] {
        assert_eq!(ask(&mut throttle, 0, queue), Turn::InLine);
    }
    // Time alone does not bring a later one to the front.
    assert_eq!(ask(&mut throttle, 100, 2), Turn::InLine);
    assert_eq!(ask(&mut throttle, 100, 0), Turn::Go { next: Some(2) });
    assert_eq!(ask(&mut throttle, 100, 0), Turn::InLine);
    assert_eq!(ask(&mut throttle, 150, 2), Turn::After(50 * MS));
    // One that stops makes room; one in the middle nobody needs to be told of.
    assert_eq!(throttle.leave(0, Direction::Write), None);
    assert_eq!(throttle.leave(2, Direction::Write), Some(1));
    assert_eq!(throttle.leave(2, Direction::Write), None);
    assert_eq!(ask(&mut throttle, 200, 1), Turn::Go { next: None });
}

proptest! {
    /// In any span, no more passes than its rate and what the bucket holds, and one request.
    #[test]
    fn no_span_passes_more_than_it_may(
        rate in 1u64..100_000,
        steps in prop::collection::vec((0u64..200_000_000, 1u64..100_000), 1..200),
    ) {
        let mut throttle = throttle(&format!("bps-total={rate}"));
        let mut now = Duration::ZERO;
        let mut went: Vec<(Duration, u64)> = Vec::new();
        for (gap, bytes) in steps {
            now += Duration::from_nanos(gap);
            loop {
                match throttle.ask(now, 0, Direction::Read, bytes) {
                    Turn::Go { .. } => break went.push((now, bytes)),
                    Turn::After(wait) => now += wait,
                    Turn::InLine => unreachable!(),
                }
            }
        }
        for (first, (start, _)) in went.iter().enumerate() {
            let mut passed = 0;
            for (end, bytes) in &went[first..] {
                // All but the last, which goes when there is any room.
                let may = f64::from(u32::try_from(rate).unwrap()) * ((*end - *start).as_secs_f64() + 0.1) + 0.01;
                prop_assert!(passed as f64 <= may, "{passed} in {:?}", *end - *start);
                passed += bytes;
            }
        }
    }
}

#[test]
fn what_goes_unasked_is_paid_for_by_those_after_it() {
    let mut throttle = throttle("iops-write=100");
    throttle.charge(Duration::ZERO, Direction::Write, 512);
    for _ in 0..29 {
        throttle.charge(Duration::ZERO, Direction::Write, 512);
    }
    // Of 30, ten are the bucket's.
    assert_eq!(throttle.ask(Duration::ZERO, 0, Direction::Write, 512), Turn::After(200 * MS));
    assert!(matches!(throttle.ask(200 * MS, 0, Direction::Write, 512), Turn::Go { next: None }));
}
