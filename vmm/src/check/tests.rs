use super::*;

fn report() -> Report {
    let checks = vec![
        Check::ok("kvm", "/dev/kvm opens"),
        Check::warn("tun", "missing", "modprobe tun"),
        Check::fail("guest", "does not run", "use another host"),
    ];
    Report { runs_stock_guest: false, checks }
}

#[test]
fn a_person_reads_what_to_do_below_each_finding() {
    let expected = "ok    kvm    /dev/kvm opens\n\
                    warn  tun    missing\n\
                    \u{20}            -> modprobe tun\n\
                    FAIL  guest  does not run\n\
                    \u{20}            -> use another host\n\
                    \n\
                    This host does not run stock guests: see what is marked FAIL.\n";
    assert_eq!(report().to_string(), expected);
}

#[test]
fn a_program_reads_the_same() {
    let json = serde_json::to_value(report()).unwrap();
    assert_eq!(json["runs_stock_guest"], false);
    assert_eq!(
        json["checks"][2],
        serde_json::json!({
            "name": "guest", "status": "fail", "detail": "does not run", "advice": "use another host"
        })
    );
    assert!(json["checks"][0]["advice"].is_null());
}

#[test]
fn this_host_can_be_examined() {
    let report = Report::make();
    let guest = report.checks.iter().find(|check| check.name == "guest");
    assert_eq!(report.runs_stock_guest, guest.is_some_and(|guest| guest.status == Status::Ok));
    for check in &report.checks {
        assert_eq!(check.advice.is_none(), check.status == Status::Ok, "{check:?}");
    }
}
