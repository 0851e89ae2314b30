/* A library to preload: one file operation below a folder fails, whoever makes it.
 *
 * Python, NumPy, ONNX, safetensors and ONNX Runtime all go through these functions of the C library. Nothing
 * happens before `faults_arm`; from then on operations on paths that begin with the prefix are counted. Operation
 * number `target` fails in the way that `kind` says; nothing fails where it is -1. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { HALF = -1, KILL = -2 }; /* otherwise an errno */

static char prefix[4096];
static size_t prefix_length;
static long count, target = -1;
static int kind, armed;
static int log_handle = -1;

/* Operations are written to `log`, one line each: what, and the path. */
void faults_arm(const char *folder, long which, int how, int log) {
    snprintf(prefix, sizeof prefix, "%s", folder);
    prefix_length = strlen(prefix);
    count = 0;
    target = which;
    kind = how;
    log_handle = log;
    armed = 1;
}

static void note(const char *what, const char *path) {
    char line[4400];
    int length = snprintf(line, sizeof line, "%s %s\n", what, path + prefix_length);
    if (log_handle >= 0) syscall(SYS_write, log_handle, line, (size_t)length);
}

/* Absolute path of a name in an open folder, or of an open file where there is no name. */
static const char *full(int folder, const char *name, char *buffer) {
    if (name && name[0] == '/') return name;
    char link[64];
    if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    long length = syscall(SYS_readlink, link, buffer, 4000L);
    if (length < 0) return "";
    buffer[length] = 0;
    if (name) snprintf(buffer + length, 4096 - (size_t)length, "/%s", name);
    return buffer;
}

/* What the operation is to do: 0 go on, HALF, or an errno. */
static int fails(const char *what, int folder, const char *name) {
    if (!armed) return 0;
    int kept = errno;
    char buffer[4096];
    const char *path = full(folder, name, buffer);
    errno = kept;
    if (strncmp(path, prefix, prefix_length) != 0) return 0;
    long number = __atomic_fetch_add(&count, 1, __ATOMIC_SEQ_CST);
    note(what, path);
    if (target < 0) return 0;
    /* A disk stays full: whatever would grow afterwards fails, too. */
    int grows = !strcmp(what, "write") || !strcmp(what, "mkdir") || !strcmp(what, "create");
    if (number != target && !(kind == ENOSPC && number > target && grows)) return 0;
    if (kind == KILL) {
        if (!strcmp(what, "write")) return HALF;
        _exit(137);
    }
    if (kind == HALF) return !strcmp(what, "write") || !strcmp(what, "read") ? HALF : 0;
    return kind;
}

#define REAL(type, name, ...)                                       \
    static type (*real)(__VA_ARGS__);                               \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)
#define REFUSE(value, what, folder, path)          \
    do {                                           \
        int how = fails(what, folder, path);       \
        if (how > 0) {                             \
            errno = how;                           \
            return value;                          \
        }                                          \
    } while (0)

static const char *way(int flags) {
    if (flags & (O_CREAT | O_TRUNC)) return "create";
    return flags & O_DIRECTORY ? "list" : "open";
}

#define OPENS(name)                                                      \
    int name(const char *path, int flags, ...) {                         \
        REAL(int, name, const char *, int, ...);                         \
        va_list rest;                                                    \
        va_start(rest, flags);                                           \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                    \
        REFUSE(-1, way(flags), AT_FDCWD, path);                          \
        return real(path, flags, mode);                                  \
    }
OPENS(open)
OPENS(open64)

#define OPENS_AT(name)                                                   \
    int name(int folder, const char *path, int flags, ...) {             \
        REAL(int, name, int, const char *, int, ...);                    \
        va_list rest;                                                    \
        va_start(rest, flags);                                           \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                    \
        REFUSE(-1, way(flags), folder, path);                            \
        return real(folder, path, flags, mode);                          \
    }
OPENS_AT(openat)
OPENS_AT(openat64)

#define STREAMS(name)                                                    \
    FILE *name(const char *path, const char *mode) {                     \
        REAL(FILE *, name, const char *, const char *);                  \
        REFUSE(NULL, mode[0] == 'r' ? "open" : "create", AT_FDCWD, path); \
        return real(path, mode);                                         \
    }
STREAMS(fopen)
STREAMS(fopen64)

DIR *opendir(const char *path) {
    REAL(DIR *, opendir, const char *);
    REFUSE(NULL, "list", AT_FDCWD, path);
    return real(path);
}

/* Half of it is done; a process that is to be killed ends there. */
#define HALVED(handle, what, size, call)                                 \
    int how = fails(what, handle, NULL);                                 \
    if (how > 0) {                                                       \
        errno = how;                                                     \
        return -1;                                                       \
    }                                                                    \
    if (how == HALF && (size) > 1) (size) /= 2;                          \
    ssize_t done = call;                                                 \
    if (how == HALF && kind == KILL) _exit(137);                         \
    return done

ssize_t write(int handle, const void *data, size_t size) {
    REAL(ssize_t, write, int, const void *, size_t);
    HALVED(handle, "write", size, real(handle, data, size));
}
#define PLACED(name, what, data_type, offset_type)                       \
    ssize_t name(int handle, data_type data, size_t size, offset_type at) { \
        REAL(ssize_t, name, int, data_type, size_t, offset_type);        \
        HALVED(handle, what, size, real(handle, data, size, at));        \
    }
PLACED(pwrite, "write", const void *, off_t)
PLACED(pwrite64, "write", const void *, off64_t)
PLACED(pread, "read", void *, off_t)
PLACED(pread64, "read", void *, off64_t)

ssize_t writev(int handle, const struct iovec *parts, int number) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    HALVED(handle, "write", number, real(handle, parts, number));
}
ssize_t read(int handle, void *data, size_t size) {
    REAL(ssize_t, read, int, void *, size_t);
    HALVED(handle, "read", size, real(handle, data, size));
}
#define SENDS(name, offset_type)                                         \
    ssize_t name(int to, int from, offset_type *at, size_t size) {       \
        REAL(ssize_t, name, int, int, offset_type *, size_t);            \
        HALVED(to, "write", size, real(to, from, at, size));             \
    }
SENDS(sendfile, off_t)
SENDS(sendfile64, off64_t)
ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t size, unsigned flags) {
    REAL(ssize_t, copy_file_range, int, off64_t *, int, off64_t *, size_t, unsigned);
    HALVED(to, "write", size, real(from, a, to, b, size, flags));
}
size_t fwrite(const void *data, size_t size, size_t number, FILE *file) {
    REAL(size_t, fwrite, const void *, size_t, size_t, FILE *);
    int how = armed ? fails("write", fileno(file), NULL) : 0;
    if (how > 0) {
        errno = how;
        return 0;
    }
    if (how == HALF && number > 1) number /= 2;
    size_t done = real(data, size, number, file);
    if (how == HALF && kind == KILL) {
        fflush(file);
        _exit(137);
    }
    return done;
}
size_t fread(void *data, size_t size, size_t number, FILE *file) {
    REAL(size_t, fread, void *, size_t, size_t, FILE *);
    int how = armed ? fails("read", fileno(file), NULL) : 0;
    if (how > 0) {
        errno = how;
        return 0;
    }
    return real(data, size, number, file);
}

#define HANDLES(name, ...)                                               \
    int name(int handle) {                                               \
        REAL(int, name, int);                                            \
        REFUSE(-1, "sync", handle, NULL);                                \
        return real(handle);                                             \
    }
HANDLES(fsync)
HANDLES(fdatasync)
#define SIZES(name, offset_type)                                         \
    int name(int handle, offset_type size) {                             \
        REAL(int, name, int, offset_type);                               \
        REFUSE(-1, "resize", handle, NULL);                              \
        return real(handle, size);                                       \
    }
SIZES(ftruncate, off_t)
SIZES(ftruncate64, off64_t)

int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *);
    REFUSE(-1, "rename", AT_FDCWD, to);
    return real(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    REAL(int, renameat, int, const char *, int, const char *);
    REFUSE(-1, "rename", b, to);
    return real(a, from, b, to);
}
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    REAL(int, renameat2, int, const char *, int, const char *, unsigned);
    REFUSE(-1, "rename", b, to);
    return real(a, from, b, to, flags);
}
int mkdir(const char *path, mode_t mode) {
    REAL(int, mkdir, const char *, mode_t);
    REFUSE(-1, "mkdir", AT_FDCWD, path);
    return real(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(int, mkdirat, int, const char *, mode_t);
    REFUSE(-1, "mkdir", folder, path);
    return real(folder, path, mode);
}
int unlink(const char *path) {
    REAL(int, unlink, const char *);
    REFUSE(-1, "remove", AT_FDCWD, path);
    return real(path);
}
int unlinkat(int folder, const char *path, int flags) {
    REAL(int, unlinkat, int, const char *, int);
    REFUSE(-1, "remove", folder, path);
    return real(folder, path, flags);
}
int rmdir(const char *path) {
    REAL(int, rmdir, const char *);
    REFUSE(-1, "remove", AT_FDCWD, path);
    return real(path);
}
int chmod(const char *path, mode_t mode) {
    REAL(int, chmod, const char *, mode_t);
    REFUSE(-1, "mode", AT_FDCWD, path);
    return real(path, mode);
}
