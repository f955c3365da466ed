/* The compiled part of the engine: the same as the Python beside it, in less time. See engine.py.
 *
 * Nothing here lets go of the interpreter lock, and nothing blocks. Each call does a bounded amount of work: that of one
 * chunk, or of as many clients as it is given; between calls the interpreter lets other threads have their turn.
 */
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <limits.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/types.h>

/* Said to engine.py, which refuses any other: the two are built and installed at different times. */
#define ENGINE_VERSION 1

#define TEXT 0x81 /* the first byte of a frame that is a whole text: final, no reserved bits, opcode 1 */
#define BINARY 0x82
#define SMALL 4096 /* bytes of text that are unmasked on the stack */
#define AT_ONCE 65536 /* bytes that one call receives */

/* ---- parsing */

static void
unmask(unsigned char *to, const unsigned char *from, Py_ssize_t size, const unsigned char mask[4])
{
    uint32_t key;
    memcpy(&key, mask, 4);
    const uint64_t wide = (uint64_t)key << 32 | key;
    Py_ssize_t i = 0;
    for (; size - i >= 8; i += 8) {
        uint64_t word;
        memcpy(&word, from + i, 8);
        word ^= wide;
        memcpy(to + i, &word, 8);
    }
    for (; i < size; i++) {
        to[i] = from[i] ^ mask[i & 3];
    }
}

static PyObject *
unmasked_bytes(const unsigned char *body, Py_ssize_t size, const unsigned char mask[4])
{
    PyObject *message = PyBytes_FromStringAndSize(NULL, size);
    if (message != NULL) {
        unmask((unsigned char *)PyBytes_AsString(message), body, size, mask);
    }
    return message;
}

static PyObject *
unmasked_text(const unsigned char *body, Py_ssize_t size, const unsigned char mask[4])
{
    unsigned char small[SMALL];
    unsigned char *text = small;
    if (size > SMALL && (text = PyMem_Malloc((size_t)size)) == NULL) {
        return PyErr_NoMemory();
    }
    unmask(text, body, size, mask);
    PyObject *message = PyUnicode_DecodeUTF8((const char *)text, size, NULL);
    if (text != small) {
        PyMem_Free(text);
    }
    return message;
}

PyDoc_STRVAR(whole_messages_doc,
"whole_messages(data, pos, max_size, most, most_size, /)\n--\n\n"
"As `frames.whole_messages_in_python`.");

static PyObject *
whole_messages(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    if (count != 5) {
        return PyErr_Format(PyExc_TypeError, "whole_messages takes 5 arguments, not %zd", count);
    }
    char *start;
    Py_ssize_t end, numbers[4];
    if (PyBytes_AsStringAndSize(args[0], &start, &end) < 0) {
        return NULL;
    }
    for (int i = 0; i < 4; i++) {
        numbers[i] = PyLong_AsSsize_t(args[i + 1]);
        if (numbers[i] == -1 && PyErr_Occurred()) {
            return NULL;
        }
    }
    Py_ssize_t pos = numbers[0], taken = 0;
    const Py_ssize_t max_size = numbers[1], most = numbers[2], most_size = numbers[3];
    if (pos < 0 || pos > end) {
        return PyErr_Format(PyExc_ValueError, "pos is %zd, of %zd bytes", pos, end);
    }
    PyObject *messages = PyList_New(0);
    if (messages == NULL) {
        return NULL;
    }
    const unsigned char *data = (const unsigned char *)start;
    /* Whatever is unusual, incomplete or wrong ends this: it is for Python to say what it is. */
    for (Py_ssize_t number = 0; number < most && taken < most_size && end - pos >= 6; number++) {
        const unsigned char *at = data + pos;
        if ((at[0] != TEXT && at[0] != BINARY) || !(at[1] & 0x80)) {
            break;
        }
        Py_ssize_t size = at[1] & 0x7F, head = 2;
        if (size == 127) {
            break;
        }
        if (size == 126) {
            size = (Py_ssize_t)at[2] << 8 | at[3];
            head = 4;
            if (size < 126) {
                break;
            }
        }
        const Py_ssize_t whole = head + 4 + size;
        if (size > max_size || whole > end - pos) {
            break;
        }
        const unsigned char *mask = at + head;
        PyObject *message;
        if (at[0] == BINARY) {
            message = unmasked_bytes(mask + 4, size, mask);
            if (message == NULL) {
                goto failed;
            }
            taken += size;
        }
        else {
            message = unmasked_text(mask + 4, size, mask);
            if (message == NULL) {
                if (!PyErr_ExceptionMatches(PyExc_UnicodeDecodeError)) {
                    goto failed;
                }
                PyErr_Clear();
                break;
            }
            taken += PyUnicode_GetLength(message);
        }
        const int refused = PyList_Append(messages, message);
        Py_DECREF(message);
        if (refused) {
            goto failed;
        }
        pos += whole;
    }
    PyObject *result = Py_BuildValue("Onn", messages, taken, pos);
    Py_DECREF(messages);
    return result;
failed:
    Py_DECREF(messages);
    return NULL;
}

/* ---- sockets */

/* The descriptors are non-blocking; but another process may share one, and make it blocking. */
#ifndef MSG_DONTWAIT
#define MSG_DONTWAIT 0
#endif
#ifndef MSG_NOSIGNAL /* macOS; Python ignores the signal */
#define MSG_NOSIGNAL 0
#endif

typedef struct {
    PyTypeObject *sender;
} State;

typedef struct {
    PyObject_HEAD
    int fd;
} Sender;

static int
as_descriptor(PyObject *number)
{
    const long fd = PyLong_AsLong(number);
    if (fd == -1 && PyErr_Occurred()) {
        return -1;
    }
    if (fd < 0 || fd > INT_MAX) {
        PyErr_Format(PyExc_ValueError, "%ld is not a descriptor", fd);
        return -1;
    }
    return (int)fd;
}

static PyObject *
sender_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *number;
    if (kwargs != NULL && PyDict_Size(kwargs) > 0) {
        PyErr_SetString(PyExc_TypeError, "Sender takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "O:Sender", &number)) {
        return NULL;
    }
    const int fd = as_descriptor(number);
    if (fd < 0) {
        return NULL;
    }
    const allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Sender *self = (Sender *)alloc(type, 0);
    if (self != NULL) {
        self->fd = fd;
    }
    return (PyObject *)self;
}

static void
sender_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    const freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static ssize_t
send_now(PyObject *sender, const char *start, Py_ssize_t size)
{
    return send(((Sender *)sender)->fd, start, (size_t)size, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static PyObject *
sender_call(PyObject *self, PyObject *args, PyObject *kwargs)
{
    PyObject *data;
    char *start;
    Py_ssize_t size;
    if (kwargs != NULL && PyDict_Size(kwargs) > 0) {
        PyErr_SetString(PyExc_TypeError, "a Sender takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "O:Sender", &data) || PyBytes_AsStringAndSize(data, &start, &size) < 0) {
        return NULL;
    }
    const ssize_t sent = send_now(self, start, size);
    return sent < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromSsize_t(sent);
}

PyDoc_STRVAR(sender_doc,
"Sender(fd, /)\n--\n\n"
"Called with bytes, it does as ``socket.send`` of the descriptor does, and holds the interpreter lock.");

static PyObject *
sender_stop(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    ((Sender *)self)->fd = -1;
    Py_RETURN_NONE;
}

static PyMethodDef sender_methods[] = {
    {"stop", sender_stop, METH_NOARGS, "Send no more: the descriptor may soon be another's. What is sent fails."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot sender_slots[] = {
    {Py_tp_doc, (void *)sender_doc},
    {Py_tp_methods, sender_methods},
    {Py_tp_new, sender_new},
    {Py_tp_dealloc, sender_dealloc},
    {Py_tp_call, sender_call},
    {0, NULL},
};

static PyType_Spec sender_spec = {
    .name = "asena_tornado.connection._engine.Sender",
    .basicsize = sizeof(Sender),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = sender_slots,
};

typedef struct {
    Py_ssize_t index, sent;
    int error;
} Rest;

static PyObject *
as_list(const Rest *rests, Py_ssize_t count)
{
    PyObject *list = PyList_New(count);
    for (Py_ssize_t i = 0; list != NULL && i < count; i++) {
        PyObject *entry = Py_BuildValue("nni", rests[i].index, rests[i].sent, rests[i].error);
        if (entry == NULL) {
            Py_CLEAR(list);
        }
        else {
            PyList_SetItem(list, i, entry); /* takes the reference */
        }
    }
    return list;
}

PyDoc_STRVAR(send_all_doc,
"send_all(senders, data, /)\n--\n\n"
"Send the same bytes by each `Sender` of a list. Returns (index, bytes taken, errno or 0) of each that did not take\n"
"them all.");

static PyObject *
send_all(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    char *start;
    Py_ssize_t size;
    if (count != 2 || !PyList_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "send_all takes a list of senders, and bytes");
        return NULL;
    }
    if (PyBytes_AsStringAndSize(args[1], &start, &size) < 0) {
        return NULL;
    }
    PyObject *senders = args[0];
    const Py_ssize_t length = PyList_Size(senders);
    PyTypeObject *type = ((State *)PyModule_GetState(module))->sender;
    for (Py_ssize_t i = 0; i < length; i++) { /* before anything is sent */
        if (!Py_IS_TYPE(PyList_GetItem(senders, i), type)) {
            return PyErr_Format(PyExc_TypeError, "number %zd of the list is not a Sender", i);
        }
    }
    Rest *rests = PyMem_Malloc((size_t)length * sizeof(Rest)); /* it may be that nobody takes everything */
    if (rests == NULL) {
        return PyErr_NoMemory();
    }
    Py_ssize_t found = 0;
    /* No Python code runs in this loop, which could change the list, or close a socket whose turn has yet to come. */
    for (Py_ssize_t i = 0; i < length; i++) {
        const ssize_t sent = send_now(PyList_GetItem(senders, i), start, size);
        if (sent == size) {
            continue;
        }
        rests[found++] = (Rest){i, sent < 0 ? 0 : (Py_ssize_t)sent, sent < 0 ? errno : 0};
    }
    PyObject *list = as_list(rests, found);
    PyMem_Free(rests);
    return list;
}

PyDoc_STRVAR(receive_doc,
"receive(fd, /)\n--\n\n"
"As ``recv`` of the descriptor's socket, of up to 64 KiB.");

static PyObject *
receive(PyObject *Py_UNUSED(module), PyObject *number)
{
    char buffer[AT_ONCE];
    const int fd = as_descriptor(number);
    if (fd < 0) {
        return NULL;
    }
    const ssize_t size = recv(fd, buffer, sizeof(buffer), MSG_DONTWAIT);
    return size < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyBytes_FromStringAndSize(buffer, size);
}

/* ---- the module */

static PyMethodDef functions[] = {
    {"whole_messages", (PyCFunction)(void (*)(void))whole_messages, METH_FASTCALL, whole_messages_doc},
    {"receive", receive, METH_O, receive_doc},
    {"send_all", (PyCFunction)(void (*)(void))send_all, METH_FASTCALL, send_all_doc},
    {NULL, NULL, 0, NULL},
};

static int
execute(PyObject *module)
{
    State *state = PyModule_GetState(module);
    state->sender = (PyTypeObject *)PyType_FromModuleAndSpec(module, &sender_spec, NULL);
    if (state->sender == NULL || PyModule_AddType(module, state->sender) < 0) {
        return -1;
    }
    return PyModule_AddIntConstant(module, "VERSION", ENGINE_VERSION);
}

static int
traverse(PyObject *module, visitproc visit, void *arg)
{
    State *state = PyModule_GetState(module);
    if (state != NULL) {
        Py_VISIT(state->sender);
    }
    return 0;
}

static int
clear(PyObject *module)
{
    State *state = PyModule_GetState(module);
    if (state != NULL) {
        Py_CLEAR(state->sender);
    }
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, execute},
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "asena_tornado.connection._engine",
    .m_doc = "The compiled part of the engine.",
    .m_methods = functions,
    .m_slots = slots,
    .m_size = sizeof(State),
    .m_traverse = traverse,
    .m_clear = clear,
};

PyMODINIT_FUNC
PyInit__engine(void)
{
    return PyModuleDef_Init(&definition);
}
