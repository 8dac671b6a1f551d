// SPDX-License-Identifier: GPL-2.0
//! Tests of the runner as a program: output and exit status. They need no kernel feature.

use std::process::Command;

/// Exit status and standard output.
fn run(args: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_memfile-tests")).args(args).output().unwrap();
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn every_end_is_reported() {
    let (code, text) = run(&["control"]);
    let wanted = [
        "KTAP version 1\n1..1\n  KTAP version 1\n  # Subtest: control\n  1..6\n",
        "\n  # this case passes\n  ok 1 pass\n",
        "\n  # this case fails on purpose\n  not ok 2 fail\n",
        "\n  ok 3 skipped # SKIP this case is skipped on purpose\n",
        "\n  # the test itself panicked\n  not ok 4 panic\n",
        "\n  # killed by signal 6\n  not ok 5 crash\n",
        "\n  not ok 6 hang # TIMEOUT 2 seconds\n",
        "\n# control: 1 passed, 4 failed, 1 skipped\nnot ok 1 control\n",
        "\n# totals: 1 passed, 4 failed, 1 skipped\n",
    ];
    for part in wanted {
        assert!(text.contains(part), "no {part:?} in:\n{text}");
    }
    assert_eq!(code, Some(1));
}

#[test]
fn exit_status_tells() {
    assert_eq!(run(&["control.pass"]).0, Some(0));
    assert_eq!(run(&["control.skipped"]).0, Some(0));
    assert_eq!(run(&["control.pass", "control.fail"]).0, Some(1));
    assert_eq!(run(&["no_such_suite"]).0, Some(1));
    assert_eq!(run(&["control_empty"]).0, Some(1));
    assert_eq!(run(&["--no-such-option"]).0, Some(2));
}

#[test]
fn skipped_suite_says_so() {
    let (_, text) = run(&["control.skipped"]);
    assert!(text.contains("\nok 1 control # SKIP every case was skipped\n"), "{text}");
}

#[test]
fn list_names_no_hidden_case() {
    let (code, text) = run(&["--list"]);
    assert_eq!(code, Some(0));
    assert!(text.lines().any(|l| l == "infra.guest_runs_on_default_vm"), "{text}");
    assert!(!text.lines().any(|l| l.starts_with("control")), "{text}");
    assert_eq!(run(&["--list", "control.p*"]).1, "control.pass\ncontrol.panic\n");
}

#[test]
fn cases_that_run_together_share_a_child_until_one_fails() {
    let (code, text) = run(&["control_together"]);
    let wanted = [
        "\n  # 0 before\n  ok 1 first_of_two\n",
        "\n  # 1 before\n  ok 2 second_of_two\n",
        "\n  not ok 3 fail\n",
        "\n  # 0 before\n  ok 4 first_of_two_again\n",
        "\n  not ok 5 hang # TIMEOUT 2 seconds\n",
        "\n  # 0 before\n  ok 6 first_after_all\n",
    ];
    for part in wanted {
        assert!(text.contains(part), "no {part:?} in:\n{text}");
    }
    assert_eq!(code, Some(1));
}
