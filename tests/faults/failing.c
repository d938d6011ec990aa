/* The n-th system call on a path below a folder fails, or writes half: preloaded by tests, see failing.py.

   Counted: open for writing or creating, write, fsync, link, rename, unlink, mkdir, rmdir, fallocate, mmap, ftruncate. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char under[PATH_MAX];
static int nth, count, number, halve;

/* half: only writes are hit, and put down half of their bytes; else a call fails with `code` */
void failing_arm(const char *folder, int which, int code, int half) {
    count = 0, number = code, halve = half;
    snprintf(under, sizeof under, "%s", folder);
    nth = which;
}
int failing_count(void) { return count; }

static int hit(const char *path) {
    return nth && path && !strncmp(path, under, strlen(under)) && ++count == nth && !halve;
}
static int hit_descriptor(int descriptor) {
    char link[64], path[PATH_MAX];
    if (!nth) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return hit(path);
}
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL return errno = number, -1

#define OPEN(name)                                                                  \
    int name(const char *path, int flags, ...) {                                    \
        va_list rest;                                                               \
        va_start(rest, flags);                                                      \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;   \
        va_end(rest);                                                               \
        if (flags & (O_WRONLY | O_RDWR | O_CREAT) && hit(path)) FAIL;               \
        return REAL(name)(path, flags, mode);                                       \
    }
OPEN(open)
OPEN(open64)
ssize_t write(int to, const void *data, size_t size) {
    int before = count;
    if (hit_descriptor(to)) FAIL;
    if (halve && nth && count == nth && count > before && size > 1) size /= 2;  /* this very call, no later pipe's */
    return REAL(write)(to, data, size);
}
int fsync(int file) { if (hit_descriptor(file)) FAIL; return REAL(fsync)(file); }
int link(const char *from, const char *to) { if (hit(to)) FAIL; return REAL(link)(from, to); }
int linkat(int a, const char *from, int b, const char *to, int flags) {
    if (hit(to)) FAIL;
    return REAL(linkat)(a, from, b, to, flags);
}
int rename(const char *from, const char *to) { if (hit(to)) FAIL; return REAL(rename)(from, to); }
int unlink(const char *path) { if (hit(path)) FAIL; return REAL(unlink)(path); }
int mkdir(const char *path, mode_t mode) { if (hit(path)) FAIL; return REAL(mkdir)(path, mode); }
int rmdir(const char *path) { if (hit(path)) FAIL; return REAL(rmdir)(path); }
int posix_fallocate(int file, off_t at, off_t size) {
    return hit_descriptor(file) ? number : REAL(posix_fallocate)(file, at, size);
}
int posix_fallocate64(int file, off64_t at, off64_t size) {
    return hit_descriptor(file) ? number : REAL(posix_fallocate64)(file, at, size);
}
void *mmap(void *at, size_t size, int prot, int flags, int file, off_t from) {
    if (file >= 0 && hit_descriptor(file)) return errno = number, MAP_FAILED;
    return REAL(mmap)(at, size, prot, flags, file, from);
}
void *mmap64(void *at, size_t size, int prot, int flags, int file, off64_t from) {
    if (file >= 0 && hit_descriptor(file)) return errno = number, MAP_FAILED;
    return REAL(mmap64)(at, size, prot, flags, file, from);
}
int ftruncate(int file, off_t size) { if (hit_descriptor(file)) FAIL; return REAL(ftruncate)(file, size); }
int ftruncate64(int file, off64_t size) { if (hit_descriptor(file)) FAIL; return REAL(ftruncate64)(file, size); }
