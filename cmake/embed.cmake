# Files as constants of a program.
#   kvreplay_embed(TARGET NAME FILE...)   notebooks-export/NAME.h declares how they are had
# Run as a script (-DOUTPUT= -DHEADER= -DFILES=a;b) it writes the source file.
if(CMAKE_SCRIPT_MODE_FILE)
  set(text "#include \"${HEADER}\"\n\n#include <stdexcept>\n#include <string>\n\nnamespace kvreplay {\nnamespace {\n\n")
  set(cases "")
  string(REPLACE "|" ";" FILES "${FILES}")
  foreach(file ${FILES})
    get_filename_component(name ${file} NAME)
    string(MAKE_C_IDENTIFIER "k_${name}" identifier)
    file(READ ${file} bytes HEX)
    string(REGEX REPLACE "(................................)" "\\1\n" bytes "${bytes}")
    string(REGEX REPLACE "([0-9a-f][0-9a-f])" "0x\\1," bytes "${bytes}")
    # char may be signed: the bytes are written as they are and narrowed once.
    string(APPEND text "constexpr unsigned char ${identifier}[] = {\n${bytes}\n0};\n\n")
    string(APPEND cases "  if (name == \"${name}\") {\n    return {reinterpret_cast<const char*>(${identifier}), "
           "sizeof(${identifier}) - 1};\n  }\n")
  endforeach()
  string(APPEND text "}  // namespace\n\nstd::string_view embedded_file(std::string_view name) {\n${cases}"
         "  throw std::logic_error(\"no file was embedded as \" + std::string(name));\n}\n\n}  // namespace kvreplay\n")
  file(WRITE ${OUTPUT} "${text}")
  return()
endif()

set(kvreplay_embed_script ${CMAKE_CURRENT_LIST_FILE})

function(kvreplay_embed target name)
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/embedded)
  set(files)
  foreach(file ${ARGN})
    get_filename_component(file ${file} ABSOLUTE)
    list(APPEND files ${file})
  endforeach()
  string(REPLACE ";" "|" joined "${files}")
  add_custom_command(OUTPUT ${folder}/${name}.cpp
    COMMAND ${CMAKE_COMMAND} -DOUTPUT=${folder}/${name}.cpp -DHEADER=notebooks-export/${name}.h "-DFILES=${joined}"
            -P ${kvreplay_embed_script}
    DEPENDS ${files} ${kvreplay_embed_script} VERBATIM)
  target_sources(${target} PRIVATE ${folder}/${name}.cpp)
endfunction()
