/* What the tests put in the agent's place: takes connections on descriptor 3, reads a command up to a NUL, answers
 * with its output, a NUL and its exit code. Static, so that it runs in any root. A command that begins with @ needs no
 * shell: "@read PATH", "@write PATH TEXT", "@list PATH". */
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static int built_in(char *line)
{
    char *path = strchr(line, ' '), *text, buffer[4096];
    ssize_t n;
    if (!path)
        return 2;
    *path++ = 0;
    text = strchr(path, ' ');
    if (text)
        *text++ = 0;
    if (!strcmp(line, "@read")) {
        int fd = open(path, O_RDONLY);
        if (fd < 0)
            return perror(path), 1;
        while ((n = read(fd, buffer, sizeof buffer)) > 0)
            write(1, buffer, n);
        return n < 0;
    }
    if (!strcmp(line, "@write") && text) {
        int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
        if (fd < 0)
            return perror(path), 1;
        return write(fd, text, strlen(text)) < 0;
    }
    if (!strcmp(line, "@list")) {
        DIR *dir = opendir(path);
        struct dirent *entry;
        if (!dir)
            return perror(path), 1;
        while ((entry = readdir(dir)))
            printf("%s\n", entry->d_name);
        fflush(stdout);
        return 0;
    }
    return 2;
}

static void serve(int fd)
{
    static char line[1 << 16];
    size_t length = 0;
    char end[16];
    int code = 2, status;
    pid_t pid;
    while (length < sizeof line - 1 && read(fd, line + length, 1) == 1 && line[length])
        length++;
    signal(SIGCHLD, SIG_DFL);
    if ((pid = fork()) == 0) {
        dup2(fd, 1);
        dup2(fd, 2);
        close(fd);
        if (line[0] == '@')
            _exit(built_in(line));
        execl("/bin/sh", "sh", "-c", line, (char *)0);
        _exit(127);
    }
    if (waitpid(pid, &status, 0) == pid)
        code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    length = 1 + snprintf(end + 1, sizeof end - 1, "%d", code);
    end[0] = 0;
    write(fd, end, length);
    _exit(0);
}

int main(int argc, char **argv)
{
    if (argc != 2 || strcmp(argv[1], "init"))
        return 2;
    fprintf(stderr, "stand-in agent is up\n");
    signal(SIGCHLD, SIG_IGN);
    for (;;) {
        int fd = accept4(3, 0, 0, SOCK_CLOEXEC);
        if (fd < 0)
            return perror("accept"), 1;
        if (fork() == 0)
            serve(fd);
        close(fd);
    }
}
