//! What the header promises, the library has: functions, constants, sizes; and what needs no
//! server: NULL and nonsense are refused, and nothing crashes.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr::{null, null_mut};

use nebd::exports::*;
use nebd::exports_io::*;

const INVAL: c_int = -22;

fn file(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Words that start with `nebd_` and are followed by `end`.
fn names(text: &str, end: char) -> BTreeSet<String> {
    text.split(end)
        .filter_map(|before| before.rsplit(|c: char| !c.is_ascii_alphanumeric() && c != '_').next())
        .filter(|name| name.starts_with("nebd_"))
        .map(str::to_owned)
        .collect()
}

fn without_comments(header: &str) -> String {
    header.split("/*").map(|part| part.split_once("*/").map_or(part, |(_, code)| code)).collect()
}

#[test]
fn header_version_script_and_library_have_the_same_functions() {
    let declared = names(&without_comments(&file("../include/nebd.h")), '(');
    // What Curve's programs link with has a header, a version and a test of its own.
    let mut versioned = names(&file("nebd.map"), ';');
    versioned.retain(|name| !name.starts_with("nebd_lib_"));
    assert_eq!(declared, versioned);
    let sources = file("src/exports.rs") + &file("src/exports_io.rs");
    // A macro writes some setters; its lines have the same shape.
    assert_eq!(declared, names(&sources, '(').intersection(&declared).cloned().collect());
    let exported = sources.matches("#[unsafe(no_mangle)]").count() - 1
        + sources.lines().filter(|line| line.contains(") => ") && line.ends_with(';')).count();
    assert_eq!(exported, declared.len(), "a function is exported that nebd.h does not declare");
}

#[test]
fn the_header_is_of_the_librarys_version() {
    let header = file("../include/nebd.h");
    let number = |name: &str| {
        let define = format!("#define NEBD_VERSION_{name} ");
        header.lines().find_map(|line| line.strip_prefix(&define)).unwrap().to_owned()
    };
    let release = [number("MAJOR"), number("MINOR"), number("PATCH")].join(".");
    // SAFETY: the library's own constant.
    let version = unsafe { CStr::from_ptr(nebd_version()) }.to_str().unwrap();
    assert_eq!(version.split('-').next().unwrap(), release);
}

/// A C compiler's view of the header, as one line of numbers.
const PROBE: &str = r#"
#include <nebd.h>
#include <stdio.h>
int main(void) {
    printf("%zu %zu %zu %zu %zu %zu", sizeof(struct nebd_event), sizeof(struct nebd_info),
           sizeof(struct nebd_stats), offsetof(struct nebd_info, block_size),
           offsetof(struct nebd_stats, blackout_worst_us), offsetof(struct nebd_event, value));
    printf(" %u %u %u %u", NEBD_FUA, NEBD_NO_UNMAP, NEBD_QUEUE(0), NEBD_QUEUE(63));
    return 0;
}
"#;

#[test]
fn c_sees_the_same_sizes_and_constants() {
    if Command::new("cc").arg("--version").output().is_err() {
        println!("SKIPPED: there is no C compiler");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, program): (PathBuf, PathBuf) = (dir.path().join("p.c"), dir.path().join("p"));
    std::fs::write(&source, PROBE).unwrap();
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("../include");
    let compiled = Command::new("cc")
        .args(["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-I"])
        .arg(include)
        .arg("-o")
        .args([&program, &source])
        .output()
        .unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let seen = Command::new(&program).output().unwrap().stdout;
    let sizes = [
        size_of::<nebd::RawEvent>(),
        size_of::<nebd::RawInfo>(),
        size_of::<nebd::RawStats>(),
        std::mem::offset_of!(nebd::RawInfo, block_size),
        std::mem::offset_of!(nebd::RawStats, blackout_worst_us),
        std::mem::offset_of!(nebd::RawEvent, value),
    ];
    let constants = [1, 2, 1 << 16, 64 << 16];
    let expected: Vec<String> = sizes.into_iter().chain(constants).map(|n| n.to_string()).collect();
    assert_eq!(String::from_utf8(seen).unwrap(), expected.join(" "));
}

unsafe extern "C" fn never(_: *mut c_void, _: c_int) {
    panic!("a refused request was completed");
}

#[test]
fn null_is_refused() {
    let mut info = nebd::RawInfo::default();
    // SAFETY: NULL is what the interface must survive.
    let refused = unsafe {
        [
            nebd_open(null(), null(), null_mut()),
            nebd_info(null_mut(), &mut info, size_of_val(&info)),
            nebd_refresh(null_mut(), &mut info, size_of_val(&info)),
            nebd_stats(null_mut(), null_mut(), 0),
            nebd_resize(null_mut(), 4096),
            nebd_read(null_mut(), null_mut(), 4096, 0, 0),
            nebd_write(null_mut(), null(), 4096, 0, 0),
            nebd_readv(null_mut(), null(), 1, 0, 0),
            nebd_writev(null_mut(), null(), 1, 0, 0),
            nebd_discard(null_mut(), 0, 4096, 0),
            nebd_write_zeroes(null_mut(), 0, 4096, 0),
            nebd_flush(null_mut(), 0),
            nebd_aio_readv(null_mut(), null(), 1, 0, 0, Some(never), null_mut()),
            nebd_aio_writev(null_mut(), null(), 1, 0, 0, None, null_mut()),
            nebd_aio_discard(null_mut(), 0, 4096, 0, Some(never), null_mut()),
            nebd_aio_write_zeroes(null_mut(), 0, 4096, 0, Some(never), null_mut()),
            nebd_aio_flush(null_mut(), 0, Some(never), null_mut()),
            nebd_poll(null_mut(), 0, 0),
            nebd_arm(null_mut(), 0),
            nebd_eventfd(null_mut(), 0),
            nebd_register_memory(null_mut(), 0, 4096, null_mut()),
            nebd_unregister_memory(null_mut(), 1),
            nebd_options_set_socket(null_mut(), c"/x".as_ptr()),
            nebd_options_set_read_only(null_mut(), 1),
        ]
    };
    assert_eq!(refused, [INVAL; 24]);
    // SAFETY: as above.
    unsafe {
        assert_eq!(nebd_close(null_mut()), 0);
        assert!(nebd_alloc(null_mut(), 4096).is_null());
        nebd_free(null_mut(), null_mut());
        nebd_options_free(null_mut());
    }
}

#[test]
fn a_failed_open_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let socket = CString::new(dir.path().join("none.sock").to_str().unwrap()).unwrap();
    let mut volume = std::ptr::dangling_mut();
    let mut text = [0; 256];
    // SAFETY: everything lives through the calls.
    unsafe {
        let options = nebd_options_new();
        assert_eq!(nebd_options_set_socket(options, socket.as_ptr()), 0);
        assert_eq!(nebd_options_set_connect_timeout_ms(options, 1), 0);
        assert_eq!(nebd_options_set_socket(options, null()), INVAL);
        assert_eq!(nebd_options_set_completion(options, 7), INVAL);
        assert!(nebd_open(c"file:none".as_ptr(), options, &mut volume) < 0);
        assert!(volume.is_null());
        let length = nebd_error_text(text.as_mut_ptr(), text.len());
        assert!(length > 0 && CStr::from_ptr(text.as_ptr()).count_bytes() == length.min(255));

        assert_eq!(nebd_open(c"no-backend".as_ptr(), options, &mut volume), INVAL);
        nebd_error_text(text.as_mut_ptr(), 8);
        assert_eq!(CStr::from_ptr(text.as_ptr()).count_bytes(), 7, "cut to the buffer");
        nebd_options_free(options);
    }
}
