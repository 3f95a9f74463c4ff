/* A disk that can fail and be cut off, preloaded into a process under test.
 *
 * fsync and fdatasync of files below POWER_CUT_WATCHED copy the file to POWER_CUT_DISK/<inode>: what
 * a power cut cannot take any more. While POWER_CUT_DISK/fail exists, the next call removes it and
 * fails with EIO; calls after it succeed, as those of Linux do after it has reported a lost write.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER;

static int keep(int file)
{
    char path[4096], link[64], kept[4096], temporary[4200], marker[4096], block[65536];
    const char *watched = getenv("POWER_CUT_WATCHED"), *disk = getenv("POWER_CUT_DISK");
    struct stat about;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (!watched || !disk || length < 0)
        return 0;
    path[length] = 0;
    if (strncmp(path, watched, strlen(watched)) || fstat(file, &about) || !S_ISREG(about.st_mode))
        return 0;
    snprintf(marker, sizeof marker, "%s/fail", disk);
    if (unlink(marker) == 0) {
        errno = EIO;
        return -1;
    }
    snprintf(kept, sizeof kept, "%s/%lu", disk, (unsigned long)about.st_ino);
    snprintf(temporary, sizeof temporary, "%s.tmp", kept);
    int from = open(link, O_RDONLY), to = open(temporary, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    while ((length = read(from, block, sizeof block)) > 0)
        if (write(to, block, length) != length)
            abort();
    close(from);
    close(to);
    return rename(temporary, kept);
}

int fsync(int file)
{
    pthread_mutex_lock(&one);
    int result = keep(file);
    pthread_mutex_unlock(&one);
    return result;
}

int fdatasync(int file) { return fsync(file); }
