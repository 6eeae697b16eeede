//! Curve's interface: what the header promises the library has, C and C++ see the layouts that Curve
//! has, and what needs no server.

use std::collections::BTreeSet;
use std::ffi::{CString, c_int, c_void};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr::{null, null_mut};
use std::sync::Mutex;

use nebd::curve::*;

/// The library is initialized for the process.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

const FUNCTIONS: [&str; 19] = [
    "nebd_lib_aio_pread",
    "nebd_lib_aio_pwrite",
    "nebd_lib_blocksize",
    "nebd_lib_close",
    "nebd_lib_discard",
    "nebd_lib_filesize",
    "nebd_lib_flush",
    "nebd_lib_getinfo",
    "nebd_lib_init",
    "nebd_lib_init_open_flags",
    "nebd_lib_init_with_conf",
    "nebd_lib_invalidcache",
    "nebd_lib_open",
    "nebd_lib_open_with_flags",
    "nebd_lib_pread",
    "nebd_lib_pwrite",
    "nebd_lib_resize",
    "nebd_lib_sync",
    "nebd_lib_uninit",
];

fn crate_dir() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn file(name: &str) -> String {
    fs::read_to_string(crate_dir().join(name)).unwrap()
}

/// Words that start with `nebd_lib_` and are followed by `end`.
fn names(text: &str, end: char) -> BTreeSet<&str> {
    text.split(end)
        .filter_map(|before| before.rsplit(|c: char| !c.is_ascii_alphanumeric() && c != '_').next())
        .filter(|name| name.starts_with("nebd_lib_"))
        .collect()
}

#[test]
fn header_version_script_and_library_have_curves_functions() {
    let expected = BTreeSet::from(FUNCTIONS);
    let header = file("../include/libnebd.h");
    let code: String = header
        .split("/*")
        .map(|part| part.split_once("*/").map_or(part, |(_, code)| code))
        .collect();
    assert_eq!(names(&code, '('), expected);
    let map = file("nebd.map");
    let (_, node) = map.split_once("NEBD_CURVE_1.0 {").unwrap();
    assert_eq!(names(node, ';'), expected);
    let source = file("src/curve.rs");
    assert_eq!(source.matches("#[unsafe(no_mangle)]").count(), FUNCTIONS.len());
    for function in FUNCTIONS {
        assert!(source.contains(&format!("extern \"C\" fn {function}(")), "{function}");
    }
}

/// Compiles as C and as C++ alike: Curve's users say `struct` or leave it out.
const PROBE: &str = r#"
#include <libnebd.h>
#include <stddef.h>
#ifdef __cplusplus
#define ASSERT(what) static_assert(what, #what)
#else
#define ASSERT(what) _Static_assert(what, #what)
#endif
ASSERT(NEBD_MAX_FILE_PATH_LEN == 1024);
ASSERT(LIBAIO_OP_READ == 0 && LIBAIO_OP_WRITE == 1);
ASSERT(LIBAIO_OP_DISCARD == 2 && LIBAIO_OP_FLUSH == 3);
ASSERT(sizeof(LIBAIO_OP) == 4 && sizeof(enum LIBAIO_OP) == 4);
ASSERT(sizeof(NebdOpenFlags) == 4 && sizeof(struct NebdOpenFlags) == 4);
ASSERT(offsetof(NebdOpenFlags, exclusive) == 0);
ASSERT(sizeof(NebdClientAioContext) == 48 && sizeof(struct NebdClientAioContext) == 48);
ASSERT(offsetof(NebdClientAioContext, offset) == 0);
ASSERT(offsetof(NebdClientAioContext, length) == 8);
ASSERT(offsetof(NebdClientAioContext, ret) == 16);
ASSERT(offsetof(NebdClientAioContext, op) == 20);
ASSERT(offsetof(NebdClientAioContext, cb) == 24);
ASSERT(offsetof(NebdClientAioContext, buf) == 32);
ASSERT(offsetof(NebdClientAioContext, retryCount) == 40);

static void with_struct(struct NebdClientAioContext *context) { context->ret = 0; }
static void without(NebdClientAioContext *context) { with_struct(context); }
static LibAioCallBack callback = without;

int (*init)(void) = nebd_lib_init;
int (*init_with_conf)(const char *) = nebd_lib_init_with_conf;
int (*uninit)(void) = nebd_lib_uninit;
void (*init_open_flags)(NebdOpenFlags *) = nebd_lib_init_open_flags;
int (*open_)(const char *) = nebd_lib_open;
int (*open_with_flags)(const char *, const NebdOpenFlags *) = nebd_lib_open_with_flags;
int (*close_)(int) = nebd_lib_close;
int (*pread_)(int, void *, off_t, size_t) = nebd_lib_pread;
int (*pwrite_)(int, const void *, off_t, size_t) = nebd_lib_pwrite;
int (*discard)(int, struct NebdClientAioContext *) = nebd_lib_discard;
int (*aio_pread)(int, struct NebdClientAioContext *) = nebd_lib_aio_pread;
int (*aio_pwrite)(int, NebdClientAioContext *) = nebd_lib_aio_pwrite;
int (*flush)(int, NebdClientAioContext *) = nebd_lib_flush;
int (*sync_)(int) = nebd_lib_sync;
int64_t (*filesize)(int) = nebd_lib_filesize;
int64_t (*blocksize)(int) = nebd_lib_blocksize;
int (*resize)(int, int64_t) = nebd_lib_resize;
int64_t (*getinfo)(int) = nebd_lib_getinfo;
int (*invalidcache)(int) = nebd_lib_invalidcache;

int main(void) { return callback == 0; }
"#;

fn compile(compiler: &str, language: [&str; 2]) {
    if Command::new(compiler).arg("--version").output().is_err() {
        println!("SKIPPED: there is no {compiler}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let source: PathBuf = dir.path().join("probe.c");
    fs::write(&source, PROBE).unwrap();
    let compiled = Command::new(compiler)
        .args(["-x", language[0], language[1], "-Wall", "-Wextra", "-Wpedantic", "-Werror"])
        .args(["-fsyntax-only", "-I"])
        .arg(crate_dir().join("../include"))
        .arg(&source)
        .output()
        .unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
}

#[test]
fn c_sees_curves_layouts_and_signatures() {
    compile("cc", ["c", "-std=gnu11"]);
}

#[test]
fn cplusplus_sees_curves_layouts_and_signatures() {
    compile("c++", ["c++", "-std=gnu++11"]);
}

unsafe extern "C" fn never(_: *mut AioContext) {
    panic!("a refused request was completed");
}

fn context(buf: *mut c_void) -> AioContext {
    AioContext { offset: 0, length: 4096, ret: 7, op: 0, cb: Some(never), buf, retry_count: 5 }
}

#[test]
fn what_is_not_there_is_refused() {
    let _one = ONE_AT_A_TIME.lock();
    let mut block = [0u8; 4096];
    let data = block.as_mut_ptr().cast();
    // SAFETY: NULL and wrong numbers are what the interface must survive; the rest lives here.
    unsafe {
        nebd_lib_init_open_flags(null_mut());
        let mut flags = OpenFlags { exclusive: 9 };
        nebd_lib_init_open_flags(&mut flags);
        assert_eq!(flags.exclusive, 1);
        assert_eq!(nebd_lib_open(null()), -1);
        assert_eq!(nebd_lib_open(c"file:x".as_ptr()), -1, "before nebd_lib_init");
        assert_eq!(nebd_lib_open_with_flags(null(), &flags), -1);
        for fd in [-1, 0, 1, c_int::MAX] {
            assert_eq!(nebd_lib_pread(fd, data, 0, 4096), -1);
            assert_eq!(nebd_lib_pwrite(fd, data, 0, 4096), -1);
            assert_eq!(nebd_lib_pread(fd, null_mut(), 0, 4096), -1);
            assert_eq!(nebd_lib_sync(fd), -1);
            assert_eq!(nebd_lib_filesize(fd), -1);
            assert_eq!(nebd_lib_getinfo(fd), -1);
            assert_eq!(nebd_lib_blocksize(fd), -1);
            assert_eq!(nebd_lib_resize(fd, 4096), -1);
            assert_eq!(nebd_lib_invalidcache(fd), -1);
            // As Curve's server has it.
            assert_eq!(nebd_lib_close(fd), 0);
            let starts =
                [nebd_lib_aio_pread, nebd_lib_aio_pwrite, nebd_lib_discard, nebd_lib_flush];
            for start in starts {
                let mut aio = context(data);
                assert_eq!(start(fd, &mut aio), -1);
                assert_eq!((aio.ret, aio.retry_count), (7, 5));
                assert_eq!(start(fd, null_mut()), -1);
                aio.cb = None;
                assert_eq!(start(fd, &mut aio), -1);
            }
        }
    }
}

fn init_with(path: &Path) -> c_int {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: a C string that lives through the call.
    unsafe { nebd_lib_init_with_conf(path.as_ptr()) }
}

#[test]
fn initializes_once_and_ends_once() {
    let _one = ONE_AT_A_TIME.lock();
    let dir = tempfile::tempdir().unwrap();
    let (good, bad) = (dir.path().join("good.conf"), dir.path().join("bad.conf"));
    fs::write(&good, "nebdserver.serverAddress=/nonexistent/nebd.sock\nlog.path=/x\n").unwrap();
    fs::write(&bad, "log.path=/x\n").unwrap();

    // SAFETY: NULL is what the interface must survive.
    assert_eq!(unsafe { nebd_lib_init_with_conf(null()) }, -1);
    assert_eq!(init_with(&dir.path().join("none.conf")), -1);
    assert_eq!(init_with(dir.path()), -1);
    assert_eq!(init_with(&bad), -1);
    assert_eq!(init_with(&good), 0);
    assert_eq!(init_with(&bad), 0, "not read again");
    assert_eq!(nebd_lib_init(), 0);
    // One end is enough, as in Curve.
    assert_eq!(nebd_lib_uninit(), 0);
    assert_eq!(init_with(&bad), -1);
    assert_eq!(nebd_lib_uninit(), 0);
}
